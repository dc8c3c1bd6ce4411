"""F2: deterministic splits. Which example goes where depends on its prompt and the seed, not on the file's order."""

import hashlib
from collections.abc import Sequence

from megatron_jq.data.prepared import SPLITS
from megatron_jq.data.prompts import Placed
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

REST = "rest"


def parse_sizes(text: str) -> dict[str, int | None]:
    """{"train": 100, "test": None} of "train=100,test=rest". UserError: another form, an unknown name, two rests."""
    sizes: dict[str, int | None] = {}
    for item in text.split(","):
        name, _, size = (piece.strip() for piece in item.partition("="))
        if name not in SPLITS:
            hint = did_you_mean(name, SPLITS, f"they are {', '.join(SPLITS)}")
            raise UserError(f"--split-sizes {text}: no split is called {name!r}; {hint}")
        if name in sizes:
            raise UserError(f"--split-sizes {text}: {name} is given twice")
        if size != REST and not (size.isascii() and size.isdigit() and int(size) > 0):
            raise UserError(f"--split-sizes {text}: {name}={size} is neither a number above 0 nor {REST}")
        sizes[name] = None if size == REST else int(size)
    return sizes


def cut(
    groups: dict[tuple[str, ...], Sequence[Placed]], sizes: dict[str, int | None], seed: int
) -> dict[str, list[Placed]]:
    """The splits. groups: the names that share one source → its examples. sizes: None takes what the others leave.

    Within a split, examples keep their order. UserError: a source has fewer examples than its splits ask for.
    """
    splits = {}
    for names, placed in groups.items():
        wanted = {name: sizes[name] for name in names}
        asked = sum(size or 0 for size in wanted.values())
        if list(wanted.values()).count(None) > 1:
            raise UserError(f"--split-sizes: {' and '.join(names)} come from one source, and only one can be the rest")
        if asked > len(placed) or (None in wanted.values() and asked == len(placed)):
            raise UserError(
                f"--split-sizes asks for {asked} examples of {', '.join(names)}, and their source has {len(placed)} "
                "that can be used; ask for fewer, or give more data"
            )
        order = sorted(range(len(placed)), key=lambda row: (_key(placed[row], seed), row))
        begin = 0
        for name, size in wanted.items():
            end = begin + (len(placed) - asked if size is None else size)
            splits[name] = [placed[row] for row in sorted(order[begin:end])]
            begin = end
    return {name: splits[name] for name in SPLITS if name in splits}


def shared_prompts(splits: dict[str, Sequence[Placed]]) -> int:
    """How many prompts stand in more than one split."""
    seen: dict[tuple[int, ...], set[str]] = {}
    for name, placed in splits.items():
        for entry in placed:
            seen.setdefault(entry.example.prompt_ids, set()).add(name)
    return sum(len(names) > 1 for names in seen.values())


def _key(placed: Placed, seed: int) -> bytes:
    example = placed.example
    return hashlib.sha256(f"{seed}\0{example.prompt_text}\0{example.answer_text}".encode()).digest()
