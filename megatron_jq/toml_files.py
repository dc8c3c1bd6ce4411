"""F0: TOML in and out for settings files, and the nearest valid name for a mistyped one."""

import difflib
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_jq.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str | Path) -> dict:
    """The file's tables as a dict. UserError names the file, and the line where it is not TOML."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def format_value(value: bool | int | float | str) -> str:
    """One scalar in TOML's syntax; reading it back gives an equal value of the same type."""
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, and surrogate pairs, which it refuses.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value)


def format_table(values: dict[str, bool | int | float | str | None]) -> str:
    """`key = value` lines. None has no form in TOML: its key is left out, which reads back as the default."""
    return "".join(f"{key} = {format_value(value)}\n" for key, value in values.items() if value is not None)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name most like a mistyped one, or None where nothing is like it."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return matches[0] if matches else None


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """The second half of an error on an unknown name."""
    match = nearest(name, names)
    return f"did you mean {match}?" if match else otherwise
