"""F2: what a data file is, by its first bytes: JSON text, gzipped or not, or parquet. Other containers are refused by
name, so that none is read as broken JSON.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_jq.errors import UserError
from megatron_jq.files import reason

INSTALL = "pip install megatron-jq[datasets]"
_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
#: First bytes → (what the file is, what to do). No JSON text begins with them.
_REFUSED = {
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it: zstd -d"),
    b"BZh": ("compressed by bzip2", "decompress it: bunzip2"),
    b"\xfd7zXZ": ("compressed by xz", "decompress it: unxz"),
    b"PK\x03\x04": ("a zip archive", "unpack it, and name the file in it"),
    b"ARROW1": ("an Arrow file", "save it as parquet or JSON lines"),
    b"\xff\xff\xff\xff": ("an Arrow stream, as datasets' save_to_disk writes", "save it with to_parquet or to_json"),
    b"Obj\x01": ("an Avro file", "save it as parquet or JSON lines"),
    b"ORC": ("an ORC file", "save it as parquet or JSON lines"),
    b"SQLite format 3": ("an SQLite database", "export its table as JSON lines"),
    b"version https://git-lfs": ("a Git LFS pointer and not the data", "fetch the data: git lfs pull"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"<!doctype html": ("an HTML page", "download the raw file"),
    b"<html": ("an HTML page", "download the raw file"),
}
_HEAD = 64  # bytes; the longest mark is shorter
_ROWS = 256  # of a parquet file, in memory at one time
_SHARD = re.compile(r"-\d+-of-(\d+)\.")


@contextmanager
def opened(path: str | Path, flag: str) -> Iterator[BinaryIO]:
    """A file of JSON text from its start, decompressed where it is gzipped. Reading from it is guarded.

    UserError: it cannot be read, is another container, breaks off or is damaged.
    """
    try:
        with open(path, "rb") as raw:
            head = _head(raw, path, flag)
            if not head.startswith(_GZIP):
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as file:
                if _head(file, path, flag).startswith((_GZIP, _PARQUET)):
                    raise UserError(f"{flag} {path}: gzipped, and no JSON in it; decompress it")
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{flag} {path}: the gzip file is damaged or breaks off ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: {reason(error)}; give a JSON-lines file that can be read") from error


def is_parquet(path: str | Path) -> bool:
    """By its first bytes. False where it cannot be read: whoever opens it says so."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_PARQUET)) == _PARQUET
    except OSError:
        return False


def read_parquet(path: str | Path, flag: str) -> Iterator[tuple[str, dict]]:
    """("path[row]", the row's columns) for every row, counted from 0. UserError: no pyarrow, a damaged file, no row."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{flag} {path} is a parquet file; reading it needs pyarrow: {INSTALL}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", without_nulls(row)
                    number += 1
    except (ArrowException, OSError) as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag} {path}: the parquet file cannot be read ({detail}); copy it again") from error
    if number == 0:
        raise UserError(f"{flag} {path} is empty; give a parquet file with rows")


def without_nulls(value: Any) -> Any:
    """A row of columns without the fields that it leaves empty: columns are all rows', so a null there is no field."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def other_shards(path: str) -> str:
    """What to say of a file that is one of several by its name, train-00000-of-00002.parquet; nothing otherwise."""
    shard = _SHARD.search(Path(path).name)
    if shard is None or int(shard[1]) < 2:
        return ""
    return f"is one of {int(shard[1])} files by its name, and the others are not read"


def _head(file: BinaryIO, path: str | Path, flag: str) -> bytes:
    head = file.read(_HEAD)
    file.seek(0)
    for mark, (what, fix) in _REFUSED.items():
        if head.lower().startswith(mark) if mark.startswith(b"<") else head.startswith(mark):
            raise UserError(f"{flag} {path} is {what}; {fix}")
    return head
