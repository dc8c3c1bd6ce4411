"""F4: the files of a checkpoint folder: their checksums, and the tokenizer's that are carried along."""

import hashlib
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_jq.data.gguf_tokenizer import gguf_tokenizer_files
from megatron_jq.errors import UserError
from megatron_jq.files import inside

MANIFEST, TOKENIZER = "checkpoint.json", "tokenizer"
#: What a tokenizer's folder may hold: the rest of such a folder (often a whole model) is not carried along.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
)  # fmt: skip


class DamagedCheckpoint(UserError):
    """A folder does not hold what it promises; the text names the file or the tensor."""


class Described(Protocol):
    """A manifest, as far as it lists files."""

    @property
    def files(self) -> dict[str, dict[str, Any]]: ...


def carry_tokenizer(source: Path, partial: Path) -> None:
    """Copy a tokenizer's file, or those of its folder that are a tokenizer's, into a checkpoint that is written."""
    target = partial / TOKENIZER
    target.mkdir(exist_ok=True)
    if source.suffix == ".gguf":
        for name, content in gguf_tokenizer_files(source, "--tokenizer-model").items():
            (target / name).write_bytes(content)
        return
    for path in [source] if source.is_file() else [source / name for name in TOKENIZER_FILES]:
        if path.is_file():
            shutil.copyfile(path, target / ("tokenizer.model" if path == source else path.name))


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return name → {"bytes", "sha256"} of files in a folder."""
    entries = {}
    for name in names:
        with open(inside(folder, name, folder / MANIFEST, DamagedCheckpoint), "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else _digest(file)
            entries[name] = {"bytes": file.tell(), "sha256": digest.hexdigest()}
    return entries


def verify(folder: Path, manifest: Described, names: Iterable[str]) -> None:
    """Raise DamagedCheckpoint for the first of these files that is not what was written."""
    for name in names:
        promised, path = manifest.files[name], inside(folder, name, folder / MANIFEST, DamagedCheckpoint)
        try:
            size = path.stat().st_size
            if size != promised["bytes"]:
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {promised['bytes']}")
            if checksums(folder, [name])[name]["sha256"] != promised["sha256"]:
                raise DamagedCheckpoint(f"{path} does not match its checksum")
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path} is missing") from error
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def file_names(folder: Path) -> list[str]:
    """Return the names of all files below a folder, as paths from it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(file: BinaryIO) -> "hashlib._Hash":
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
