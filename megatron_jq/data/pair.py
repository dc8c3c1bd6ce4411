"""F2: a supervised pair as text, before it has token ids."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One (x*, y*) and where it came from, for error messages: "train.jsonl:17" or "builtin:recall[3]"."""

    prompt: str
    answer: str
    where: str
