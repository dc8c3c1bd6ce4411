"""F2: a tokenizer's files: read whole, and written so that no reader meets half of one."""

import os
import tempfile
from pathlib import Path

from megatron_jq.errors import UserError


def read_file(path: str | Path, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; name a tokenizer that can be read") from error


def write_atomically(path: str | Path, content: bytes) -> None:
    """Under its final name the file is whole or absent: other ranks may be waiting for it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
