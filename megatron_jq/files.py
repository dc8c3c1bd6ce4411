"""F0: what is written stays written: files and names that are on disk before the next step relies on them."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on disk. OSError where it cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a file and sync it. OSError where that cannot be done."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def reason(fault: OSError) -> str:
    """What the system said; a library's own words where it did not pass that on."""
    return fault.strerror or str(fault) or type(fault).__name__
