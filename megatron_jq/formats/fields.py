"""F1: a record's fields as text. Every error names the record's file and line, the field, and the fix."""

import math
from typing import Any

from megatron_jq.formats.record_error import RecordError
from megatron_jq.toml_files import did_you_mean


def lookup(record: dict, field: str) -> Any:
    """The field's value: of the record, or with dots of objects in it ("reward_model.ground_truth"). None: no such."""
    if field in record:
        return record[field]
    name, dot, rest = field.partition(".")
    inner = record.get(name) if dot else None
    return lookup(inner, rest) if isinstance(inner, dict) else None


def text_field(record: dict, field: str, place: str, flag: str | None = None) -> str:
    """The field's text. `flag` is the option that names the field, where one does."""
    value = lookup(record, field)
    if value is None and field not in record:
        hint = did_you_mean(field, record, f"the line has {', '.join(sorted(record)) or 'no field at all'}")
        hint_of_flag = f" ({flag} names the field)" if flag else ""
        raise RecordError(place, f"no {field}", f"no field {field!r}; {hint}{hint_of_flag}")
    return as_text(value, f"field {field!r}", place, kind=f"no {field}")


def as_text(value: object, what: str, place: str, *, kind: str, empty_allowed: bool = False) -> str:
    """A string or a number as text. RecordError: of another type, empty, not UTF-8, not a finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(place, kind, f"{what} is {value}, which is not a number; fill it or remove the record")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)  # from the hub; a file's numbers are NumberText
    if not isinstance(value, str):
        names = {type(None): "null", bool: "a boolean", list: "a list", dict: "an object"}
        kind_of = names.get(type(value), type(value).__name__)
        raise RecordError(place, kind, f"{what} is {kind_of}; write a string or a number")
    if not value.strip() and not empty_allowed:
        raise RecordError(place, kind, f"{what} is empty; fill it or remove the record")
    if any("\ud800" <= character <= "\udfff" for character in value):
        detail = f"{what} holds half a surrogate pair, which is no character, or bytes that are not UTF-8; fix it"
        raise RecordError(place, "not UTF-8", detail)
    return str(value)


def text_list(record: dict, field: str, place: str, flag: str | None = None) -> list[str]:
    """The field's list of at least one text. RecordError as for text_field."""
    values = lookup(record, field)
    if not isinstance(values, list) or not values:
        hint_of_flag = f" ({flag} names the field)" if flag else ""
        raise RecordError(place, f"no {field}", f"field {field!r} is not a list with something in it{hint_of_flag}")
    return [as_text(value, f"an item of {field!r}", place, kind=f"no {field}") for value in values]


def answers_of(record: dict, field: str, place: str, flag: str | None = None) -> tuple[str, tuple[str, ...]]:
    """(the gold answer, others that count as right) of a field with a text or a list of them. RecordError as above."""
    if isinstance(lookup(record, field), list):
        gold, *aliases = text_list(record, field, place, flag)
        return gold, distinct_aliases(gold, aliases)
    return text_field(record, field, place, flag), ()


def distinct_aliases(gold: str, aliases: list[str]) -> tuple[str, ...]:
    """The aliases in order, without blanks at their ends, blank ones, repetitions and the gold answer itself."""
    bare = (alias.strip() for alias in aliases)
    return tuple(dict.fromkeys(alias for alias in bare if alias and alias != gold.strip()))
