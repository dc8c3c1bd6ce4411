"""F4: Hugging Face folders of safetensors: read by rows, written tensor by tensor, never left half written.

Nothing of a folder is run and no pickle of it is read: weights come from *.safetensors alone. Memory is what one
tensor takes, in reading and in writing; the `safetensors` package writes whole files from memory only, so the writer
here lays out its format itself (8 bytes of header length, the header as JSON, the tensors' bytes).
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_jq.errors import UserError
from megatron_jq.files import inside, sync

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"

#: safetensors' name → torch's, of the types that weights may have.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: name → (shape, dtype)
Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _safe_open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError("Hugging Face folders need: pip install megatron-jq[hf]") from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


class WeightReader(Protocol):
    """Tensors by Hugging Face's names, read by rows. folder: what messages name."""

    folder: Path
    signature: Signature

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor: ...


class HuggingFaceReader:
    """A folder's tensors. UserError where it has none, or where index and files do not agree.

    signature: name → (shape, dtype). A file is mapped, and what was read of it counts as this process's memory: it is
    opened again every now and then. Not for every tensor: a file's header may list thousands.
    """

    #: Bytes read before a file is opened again.
    MAPPED = 1 << 27

    def __init__(self, folder: str | Path, flag: str = "--hf"):
        self.folder = Path(folder)
        self.signature: Signature = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path | None, Any] = None, None
        self._mapped = 0
        self.paths = _weight_files(self.folder, flag)
        for path in self.paths:
            with _safe_open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in self._file_of:
                        raise UserError(f"{path} and {self._file_of[name].name} both hold {name}; remove one of them")
                    entry = file.get_slice(name)
                    if entry.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{path}: {name} has type {entry.get_dtype()}; quantised checkpoints cannot be read, "
                            f"only {', '.join(DTYPES)}"
                        )
                    self.signature[name] = tuple(entry.get_shape()), DTYPES[entry.get_dtype()]
                    self._file_of[name] = path
        self._check_index()

    def _check_index(self) -> None:
        path = self.folder / INDEX
        if not path.exists():
            return
        for name, file in _weight_map(path).items():
            if name not in self._file_of or self._file_of[name].name != file:
                raise UserError(f"{path} says that {file} holds {name}, but it does not; download the folder again")

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Return rows [start, end) of a tensor and, of a matrix, columns [start, end), in the file's dtype.

        It may lie in the mapped file: copy it and let it go.
        """
        path = self._file_of[name]
        if self._open[0] != path or self._mapped > self.MAPPED:
            self._open, self._mapped = (None, None), 0  # lets the last one go first
            self._open = path, _safe_open(path)
        try:
            entry = self._open[1].get_slice(name)
            block = entry[slice(*rows)] if columns is None else entry[slice(*rows), slice(*columns)]
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}; has the file been changed?") from error
        self._mapped += block.nbytes
        return block


def _weight_files(folder: Path, flag: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder")
    if (folder / INDEX).exists():
        files = sorted(set(_weight_map(folder / INDEX).values()))
        paths = [folder / file for file in files]
        for path in paths:
            if not path.is_file():
                raise UserError(f"{folder / INDEX} names {path.name}, which is missing; download the folder again")
        return paths
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{flag} {folder} holds pickled weights (*.bin), which can run code and are not read; convert them to "
            "safetensors: transformers' save_pretrained writes it"
        )
    raise UserError(f"{flag} {folder} holds no weights: neither {WEIGHTS} nor {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} has no weight_map; download the folder again")
    for name, file in table.items():
        inside(path.parent, file, path)
        if "/" in file:
            raise UserError(f"{path}: weight_map places {name} in {file!r}; only files of the folder itself are read")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError where the file cannot be read or holds something else."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return table


def check_tensors(signature: Signature, expected: Mapping[str, tuple[int, ...]], folder: str | Path) -> None:
    """Raise UserError where the names or a shape differ from what the family has; it names the first few."""
    present = signature.keys()
    for what, names in (("lacks", expected.keys() - present), ("has unexpected", present - expected.keys())):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{folder} {what} {len(names)} of the tensors that its config.json asks for: {first}"
                if what == "lacks"
                else f"{folder} {what} tensors, {len(names)} in all: {first}; its config.json does not describe them"
            )
    for name, shape in expected.items():
        if signature[name][0] != tuple(shape):
            raise UserError(f"{folder}: {name} has shape {signature[name][0]}, by its config.json {tuple(shape)}")


def refuse_existing(target: Path, flag: str, but: str | None = None) -> None:
    """UserError where a target to write to holds something already, other than an entry of the name `but`."""
    if target.exists() and (not target.is_dir() or any(path.name != but for path in target.iterdir())):
        raise UserError(f"{flag} {target} exists and is not empty; name a new folder, or remove that one")


@contextlib.contextmanager
def new_folder(target: Path, flag: str) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends well, and is removed when it does not.

    UserError where target holds something, or where writing fails (disk full, no permission).
    """
    refuse_existing(target, flag)
    partial = target.absolute().parent / f".{target.absolute().name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in [*partial.iterdir(), partial]:
                sync(path)
            partial.replace(target)
            sync(target.absolute().parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{flag} {target} cannot be written: {error.strerror or error}") from error


def write_weights(
    folder: Path, signature: Signature, read: Callable[[str], torch.Tensor], max_shard_bytes: int
) -> None:
    """One safetensors file, or several of at most max_shard_bytes with their index (a larger tensor has its own).

    read: a tensor by its name; called once each, in the signature's order, so that one is in memory at a time.
    """
    shards = _split(signature, max_shard_bytes)
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        _write_safetensors(folder / file, {name: signature[name] for name in names}, read)
    if count > 1:
        table = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(map(num_bytes, signature.values()))}, "weight_map": table}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def num_bytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = entry
    return math.prod(shape) * dtype.itemsize


def _split(signature: Signature, max_shard_bytes: int) -> list[list[str]]:
    shards, room = [], 0
    for name, entry in signature.items():
        if not shards or num_bytes(entry) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= num_bytes(entry)
    return shards


def _write_safetensors(path: Path, signature: Signature, read: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, (shape, dtype) in signature.items():
        start, end = end, end + num_bytes((shape, dtype))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in signature.items():
            tensor = read(name)
            assert tuple(tensor.shape) == shape and tensor.dtype == dtype, f"{name}: not what was announced"
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor
