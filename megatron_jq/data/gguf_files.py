"""F2: GGUF files: what stands before the weights (keys and values, the list of tensors), read without any package.

The format: "GGUF", version, numbers of tensors and of keys, the keys with their values, the tensors' names, shapes,
types and offsets, and from the next multiple of the alignment on the tensors' bytes. Little-endian throughout
(llama.cpp's docs/gguf.md).
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jq.errors import UserError

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
#: Type of a value → struct's letter. The other two are texts (8) and arrays (9).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. shape: as torch has it, rows first. kind: the number of its GGML type. start: of its
    first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufFile:
    """values: the file's keys. tensors: by the file's own names."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family: the prefix of the keys that describe the model."""
        return str(self.values.get("general.architecture"))


def gguf_in(path: Path, flag: str) -> Path | None:
    """Return the GGUF file that a path is, or that a folder without safetensors holds; None where there is none.

    UserError: a folder holds several.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if not files or next(path.glob("*.safetensors*"), None) is not None:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
        raise UserError(f"{flag} {path} holds {len(files)} GGUF files ({names}); name one of them: {flag} {files[0]}")
    return files[0]


def read_gguf(path: Path, flag: str) -> GgufFile:
    """Read all but the weights. UserError: no GGUF file, one part of several, or one that is cut off."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise UserError(f"{flag} {path} does not begin as a GGUF file does; name a model in that format")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _parse(path, content, flag)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    except (struct.error, IndexError) as error:
        raise UserError(f"{flag} {path} ends before its list of tensors does; download it again") from error
    except (UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{flag} {path} is damaged: a value of it cannot be read; download it again") from error


def _parse(path: Path, content: mmap.mmap, flag: str) -> GgufFile:
    cursor = _Cursor(content, 4)
    version, num_tensors, num_values = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    if version not in _VERSIONS:
        raise UserError(
            f"{flag} {path} has version {version:#x} of the format, not {' or '.join(map(str, _VERSIONS))} in "
            "little-endian order; write it again with a newer llama.cpp"
        )
    values = {}
    for _ in range(num_values):
        key = cursor.text()
        values[key] = cursor.value(cursor.take("I"))
    if values.get("split.count", 0) > 1:
        raise UserError(
            f"{flag} {path} is part {values.get('split.no', 0) + 1} of {values['split.count']}; put them into one file "
            f"with llama.cpp's llama-gguf-split --merge {path} WHOLE.gguf"
        )
    listed = {}
    for _ in range(num_tensors):
        name = cursor.text()
        shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))[::-1]
        listed[name] = shape, cursor.take("I"), cursor.take("Q")
    alignment = values.get("general.alignment", _ALIGNMENT)
    data = -(-cursor.at // alignment) * alignment
    return GgufFile(path, values, {name: GgufTensor(s, kind, data + at) for name, (s, kind, at) in listed.items()})


class _Cursor:
    """Reads one value after another."""

    def __init__(self, content: mmap.mmap, at: int):
        self._content, self.at = content, at

    def take(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._content, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self._content):
            raise IndexError(length)
        self.at += length
        return self._content[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        element, count = self.take("I"), self.take("Q")
        if element in _SCALARS:
            layout = f"<{count}{_SCALARS[element]}"
            elements = struct.unpack_from(layout, self._content, self.at)
            self.at += struct.calcsize(layout)
            return list(elements)
        return [self.value(element) for _ in range(count)]
