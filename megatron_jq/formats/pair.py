"""F1: a supervised pair as text, before it has token ids."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One (x*, y*) and where it came from, for error messages: "train.jsonl:17" or "builtin:recall[3]".

    aliases: further answers that count as right. parts: the prompt's pieces by name, for templates: ("question", …),
    ("context", …); empty where the prompt is one piece. rationale: a worked solution, where one was asked for.
    """

    prompt: str
    answer: str
    place: str
    aliases: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    rationale: str | None = None
