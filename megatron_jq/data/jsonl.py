"""F2: JSON records of a file, one a line or in one list, and their fields as text. Faults name the file and line."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_jq.data.containers import is_parquet, opened, read_parquet
from megatron_jq.errors import UserError
from megatron_jq.formats.record_error import RecordError

#: A longer record is none: some million tokens, or a file without line ends.
MAX_RECORD_BYTES = 4 * 2**20

#: "path:line" and the object there, or what is wrong with it.
Record = tuple[str, dict]


class NumberText(str):
    """A JSON number as it stands in the file: 0.10 stays "0.10", 1e3 stays "1e3", no digit is rounded away."""


def read_records(path: str | Path, *, flag: str = "--train-data") -> Iterator[Record | RecordError]:
    """Yield the objects of a file in order, and errors among them: one object a line, or one JSON list over any lines,
    gzipped or not; or the rows of a parquet file.

    UserError: no such file, nothing in it, a list that breaks off, another container.
    """
    if is_parquet(path):
        yield from read_parquet(path, flag)
        return
    empty = True
    with opened(path, flag) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        records = _list_items(file.read(), path) if start.startswith(b"[") else _lines(file, path)
        for record in records:
            empty = False
            yield record
    if empty:
        raise UserError(f"{flag} {path} is empty; give a file with one JSON object a line")


def _lines(file: BinaryIO, path: str | Path) -> Iterator[Record | RecordError]:
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number in itertools.count(1):
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        place = f"{path}:{number}"
        if len(line) > MAX_RECORD_BYTES:
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(MAX_RECORD_BYTES + 1)):
                size += len(line)
            yield _too_large(place, size)
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield _parse(line, place)


def _parse(line: bytes, place: str) -> Record | RecordError:
    try:
        return place, _object(_DECODER.decode(line.decode("utf-8").rstrip("\n")), place)
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        return RecordError(place, "not UTF-8", detail)
    except json.JSONDecodeError as error:
        detail = f"not JSON at column {error.colno} ({error.msg}); write one object a line"
        return RecordError(place, "not JSON", detail)
    except RecursionError:
        return RecordError(place, "not JSON", "JSON nested too deeply; write one flat object a line")
    except _NotANumberError as error:
        detail = f"{error} is not a JSON number; write a string or a finite number"
        return RecordError(place, "not JSON", detail)
    except RecordError as error:
        return error


def _list_items(data: bytes, path: str | Path) -> Iterator[Record | RecordError]:
    """The items of one JSON list, each with the line on which it begins, and its place in the list, from 0, where the
    one before begins on the same line. Bytes that are not UTF-8 become halves of surrogate pairs, which as_text refuses
    where a field that is read holds one.
    """
    text = data.decode("utf-8-sig", errors="surrogateescape")
    del data  # such files are large
    at, line = _SPACE.match(text, text.index("[") + 1).end(), 1
    counted = line_before = 0
    for item in itertools.count():
        if text.startswith("]", at):
            return
        line += text.count("\n", counted, at)
        counted, place = at, f"{path}:{line}" + f"[{item}]" * (line == line_before)
        line_before = line
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            place = f"{path}:{error.lineno}"
            raise UserError(f"{place}: the JSON list breaks off at column {error.colno} ({error.msg})") from error
        except (RecursionError, _NotANumberError) as error:
            raise UserError(f"{place}: the JSON list cannot be read on from this item ({error})") from error
        try:
            yield (place, _object(value, place)) if end - at <= MAX_RECORD_BYTES else _too_large(place, end - at)
        except RecordError as error:
            yield error
        at = _SPACE.match(text, end).end()
        if text.startswith(",", at):
            at = _SPACE.match(text, at + 1).end()
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise UserError(f"{path}:{line}: the JSON list breaks off: a comma or ] is missing")


def _object(value: object, place: str) -> dict:
    if not isinstance(value, dict):
        detail = 'not a JSON object; write one object a line, like {"prompt": …, "answer": …}'
        raise RecordError(place, "not an object", detail)
    return value


def _too_large(place: str, size: int) -> RecordError:
    limit = MAX_RECORD_BYTES // 2**20
    detail = f"{size / 2**20:.1f} MiB in one record, more than {limit} MiB; cut it, or end its lines"
    return RecordError(place, f"over {limit} MiB", detail)


class _NotANumberError(Exception):
    """NaN or an infinity, which Python's reader would let through and JSON does not have."""


def _refuse_constant(name: str) -> None:
    raise _NotANumberError(name)


_DECODER = json.JSONDecoder(parse_int=NumberText, parse_float=NumberText, parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\r\n]*")
