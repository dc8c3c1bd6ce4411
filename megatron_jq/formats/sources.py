"""F1: sources that are no files of records: what their names begin with."""

BUILTIN_PREFIX = "builtin:"
REASONING_GYM_PREFIX = "reasoning-gym:"


def is_builtin(source: str) -> bool:
    """Whether a source is a built-in task."""
    return source.startswith(BUILTIN_PREFIX)


def is_reasoning_gym(source: str) -> bool:
    """Whether a source is a set of the package reasoning-gym."""
    return source.startswith(REASONING_GYM_PREFIX)


def is_made(source: str) -> bool:
    """Whether a source makes its examples: it has held-out ones too, and no records that a format reads."""
    return is_builtin(source) or is_reasoning_gym(source)
