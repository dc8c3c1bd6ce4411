"""F0: what is written stays written: files and names that are on disk before the next step relies on them."""

import os
from pathlib import Path

from megatron_jq.errors import UserError


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


def inside(folder: Path, name: object, source: object, kind: type[Exception] = UserError) -> Path:
    """Return the path of `name`, which was read from the file `source`, below `folder`.

    Every name that a file gives goes through here before it is opened, whatever for: a manifest or an index may come
    from anywhere. `kind` is raised for what is no relative path below the folder (absolute, `..`, empty, no text).
    Links that lie in the folder are followed: they are the user's, not the file's (Hugging Face's cache is made of
    them).
    """
    text = name if isinstance(name, str) else ""
    parts = text.split("/")
    if not text or "\0" in text or "\\" in text or any(part in ("", ".", "..") for part in parts):
        raise kind(f"{source} names {name!r}, which is no file below {folder}; get the folder again from its origin")
    return folder.joinpath(*parts)


def reason(error: OSError) -> str:
    """Return the system's message; a library's own words where it did not pass that on."""
    return error.strerror or str(error) or type(error).__name__
