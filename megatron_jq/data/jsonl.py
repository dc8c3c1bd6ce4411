"""F2: pairs from a JSON-lines file with named prompt and answer fields. Every fault names its file and line."""

import json
from pathlib import Path

from megatron_jq.data.pair import Pair
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean


class _NumberText(str):
    """A JSON number as it stands in the file: 0.10 stays "0.10", 1e3 stays "1e3", no digit is rounded away."""


def read_jsonl(path: str | Path, prompt_field: str, answer_field: str, *, flag: str = "--train-data") -> list[Pair]:
    """Every pair of the file in order; `where` is "path:line", 1-based. Blank lines are passed over.

    A value is a non-empty string, or a number, which is taken as its text in the file. `flag` is the option that named
    the file. UserError: no such file, nothing in it, not UTF-8, not JSON, not an object, a field that is missing, empty
    or of another kind.
    """
    pairs = []
    for where, record in read_records(path, flag=flag):
        prompt = text_field(record, prompt_field, where, "--prompt-field")
        answer = text_field(record, answer_field, where, "--answer-field")
        pairs.append(Pair(prompt, answer, where))
    return pairs


def read_records(path: str | Path, *, flag: str = "--train-data", limit: int | None = None) -> list[tuple[str, dict]]:
    """("path:line", object) for each of the file's first `limit` lines that are not blank; all where limit is None."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; give a JSON-lines file that can be read") from error
    records = []
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            records.append((where, _parse(line, where)))
            if len(records) == limit:
                break
    if not records:
        raise UserError(f"{flag} {path} is empty; give a file with one JSON object a line")
    return records


def text_field(record: dict, field: str, where: str, flag: str) -> str:
    """The field's text. `flag` is the option that names the field."""
    if field not in record:
        hint = did_you_mean(field, record, f"the line has {', '.join(sorted(record)) or 'no field at all'}")
        raise UserError(f"{where}: no field {field!r}; {hint} ({flag} names the field)")
    value = record[field]
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "a boolean", list: "a list", dict: "an object"}[type(value)]
        raise UserError(f"{where}: field {field!r} is {kind}; write a string or a number")
    if not value.strip():
        raise UserError(f"{where}: field {field!r} is empty; fill it or remove the line")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: field {field!r} holds half a surrogate pair, which is no character; mend it")
    return str(value)


def _parse(line: bytes, where: str) -> dict:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
    try:
        record = json.loads(text, parse_int=_NumberText, parse_float=_NumberText, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at column {error.colno} ({error.msg}); write one object a line") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply; write one flat object a line") from error
    except _NotANumberError as error:
        raise UserError(f"{where}: {error} is not a JSON number; write a string or a finite number") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: not a JSON object; write one object a line, like {{"prompt": …, "answer": …}}')
    return record


class _NotANumberError(Exception):
    """NaN or an infinity, which Python's reader would let through and JSON does not have."""


def _refuse_constant(name: str) -> None:
    raise _NotANumberError(name)
