"""F2: JSON records of a file, one a line or in one list, and their fields as text. Faults name the file and line."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_jq.data.containers import is_parquet, opened, read_parquet
from megatron_jq.data.faults import RecordError
from megatron_jq.data.pair import Pair
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

#: A longer record is none: some million tokens, or a file without line ends.
MAX_RECORD_BYTES = 4 * 2**20

#: "path:line" and the object there, or what is wrong with it.
Record = tuple[str, dict]


class NumberText(str):
    """A JSON number as it stands in the file: 0.10 stays "0.10", 1e3 stays "1e3", no digit is rounded away."""


def pair_of(where: str, record: dict, prompt_field: str, answer_field: str) -> Pair:
    """A value is a non-empty string, or a number, which is taken as its text in the file. A list of answers is the gold
    one and others that count as right. RecordError: a field that is missing, empty or of another kind.
    """
    if isinstance(lookup(record, prompt_field), list):
        detail = f"field {prompt_field!r} is a list; write a string, or give --data-format messages for chat messages"
        raise RecordError(where, f"no {prompt_field}", detail)
    if prompt_field not in record and isinstance(record.get("conversations"), list):
        detail = "'conversations' is not read; write it as 'messages', with 'role' and 'content' for 'from' and 'value'"
        raise RecordError(where, f"no {prompt_field}", detail)
    prompt = text_field(record, prompt_field, where, "--prompt-field")
    gold, aliases = answers_of(record, answer_field, where, "--answer-field")
    return Pair(prompt, gold, where, aliases)


def answers_of(record: dict, field: str, where: str, flag: str | None = None) -> tuple[str, tuple[str, ...]]:
    """(the gold answer, others that count as right) of a field with a text or a list of them. RecordError as above."""
    if isinstance(lookup(record, field), list):
        gold, *aliases = text_list(record, field, where, flag)
        return gold, distinct_aliases(gold, aliases)
    return text_field(record, field, where, flag), ()


def read_records(path: str | Path, *, flag: str = "--train-data") -> Iterator[Record | RecordError]:
    """The objects of a file in order, faults among them: one object a line, or one JSON list over any lines, gzipped or
    not; or the rows of a parquet file.

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


def lookup(record: dict, field: str) -> Any:
    """The field's value: of the record, or with dots of objects in it ("reward_model.ground_truth"). None: no such."""
    if field in record:
        return record[field]
    name, dot, rest = field.partition(".")
    inner = record.get(name) if dot else None
    return lookup(inner, rest) if isinstance(inner, dict) else None


def text_field(record: dict, field: str, where: str, flag: str | None = None) -> str:
    """The field's text. `flag` is the option that names the field, where one does."""
    value = lookup(record, field)
    if value is None and field not in record:
        hint = did_you_mean(field, record, f"the line has {', '.join(sorted(record)) or 'no field at all'}")
        named = f" ({flag} names the field)" if flag else ""
        raise RecordError(where, f"no {field}", f"no field {field!r}; {hint}{named}")
    return as_text(value, f"field {field!r}", where, kind=f"no {field}")


def as_text(value: object, what: str, where: str, *, kind: str, empty_allowed: bool = False) -> str:
    """A string or a number as text. RecordError: of another type, empty, not UTF-8, not a finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(where, kind, f"{what} is {value}, which is not a number; fill it or remove the record")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)  # from the hub; a file's numbers are NumberText
    if not isinstance(value, str):
        names = {type(None): "null", bool: "a boolean", list: "a list", dict: "an object"}
        kind_of = names.get(type(value), type(value).__name__)
        raise RecordError(where, kind, f"{what} is {kind_of}; write a string or a number")
    if not value.strip() and not empty_allowed:
        raise RecordError(where, kind, f"{what} is empty; fill it or remove the record")
    if any("\ud800" <= character <= "\udfff" for character in value):
        detail = f"{what} holds half a surrogate pair, which is no character, or bytes that are not UTF-8; mend it"
        raise RecordError(where, "not UTF-8", detail)
    return str(value)


def text_list(record: dict, field: str, where: str, flag: str | None = None) -> list[str]:
    """The field's list of at least one text. RecordError as for text_field."""
    values = lookup(record, field)
    if not isinstance(values, list) or not values:
        named = f" ({flag} names the field)" if flag else ""
        raise RecordError(where, f"no {field}", f"field {field!r} is not a list with something in it{named}")
    return [as_text(value, f"an item of {field!r}", where, kind=f"no {field}") for value in values]


def distinct_aliases(gold: str, aliases: list[str]) -> tuple[str, ...]:
    """The aliases in order, without blanks at their ends, blank ones, repetitions and the gold answer itself."""
    bare = (alias.strip() for alias in aliases)
    return tuple(dict.fromkeys(alias for alias in bare if alias and alias != gold.strip()))


def _lines(file: BinaryIO, path: str | Path) -> Iterator[Record | RecordError]:
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number in itertools.count(1):
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        where = f"{path}:{number}"
        if len(line) > MAX_RECORD_BYTES:
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(MAX_RECORD_BYTES + 1)):
                size += len(line)
            yield _too_large(where, size)
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield _parse(line, where)


def _parse(line: bytes, where: str) -> Record | RecordError:
    try:
        return where, _object(_DECODER.decode(line.decode("utf-8").rstrip("\n")), where)
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        return RecordError(where, "not UTF-8", detail)
    except json.JSONDecodeError as error:
        detail = f"not JSON at column {error.colno} ({error.msg}); write one object a line"
        return RecordError(where, "not JSON", detail)
    except RecursionError:
        return RecordError(where, "not JSON", "JSON nested too deeply; write one flat object a line")
    except _NotANumberError as error:
        detail = f"{error} is not a JSON number; write a string or a finite number"
        return RecordError(where, "not JSON", detail)
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
        counted, where = at, f"{path}:{line}" + f"[{item}]" * (line == line_before)
        line_before = line
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise UserError(f"{where}: the JSON list breaks off at column {error.colno} ({error.msg})") from error
        except (RecursionError, _NotANumberError) as error:
            raise UserError(f"{where}: the JSON list cannot be read on from this item ({error})") from error
        try:
            yield (where, _object(value, where)) if end - at <= MAX_RECORD_BYTES else _too_large(where, end - at)
        except RecordError as error:
            yield error
        at = _SPACE.match(text, end).end()
        if text.startswith(",", at):
            at = _SPACE.match(text, at + 1).end()
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise UserError(f"{path}:{line}: the JSON list breaks off: a comma or ] is missing")


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        detail = 'not a JSON object; write one object a line, like {"prompt": …, "answer": …}'
        raise RecordError(where, "not an object", detail)
    return value


def _too_large(where: str, size: int) -> RecordError:
    limit = MAX_RECORD_BYTES // 2**20
    detail = f"{size / 2**20:.1f} MiB in one record, more than {limit} MiB; cut it, or end its lines"
    return RecordError(where, f"over {limit} MiB", detail)


class _NotANumberError(Exception):
    """NaN or an infinity, which Python's reader would let through and JSON does not have."""


def _refuse_constant(name: str) -> None:
    raise _NotANumberError(name)


_DECODER = json.JSONDecoder(parse_int=NumberText, parse_float=NumberText, parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\r\n]*")
