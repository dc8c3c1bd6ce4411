"""F2: built-in short tasks, drawn from a seed, on which a tiny model can leave a true cold start.

No prompt says what the answer should look like. A policy with random weights must find the answer's format (its fixed
words and its end) and its content (words of the prompt, in another order) at once, which it never does by chance: about
nine answer tokens over some sixty pieces are P near e^-36. The mapping is still learnable from a few hundred examples,
and held-out items are new combinations of known words.

Three kinds of rising difficulty, every word and full stop separated by spaces so that each is one token:

    recall   Mira brings a green kite .
             the kite of Mira is green today .
    reorder  Mira brings a green kite and Theo brings a red drum .
             Theo holds the red drum and Mira holds the green kite .
    sum      Mira has two pears and Theo has three .
             Mira and Theo have five pears together .

In `sum` every pair of numbers occurs in training, with other people and other things: what is held out is the
combination, since a tiny model looks a sum up and cannot work it out.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 5  # one combination in five is held out

_NAMES = tuple("Mira Theo Anna Boris Carla Dev Elsa Farid Greta Hugo Ines Jonas Kenji Lena Omar Petra".split())
_COLOURS = tuple(
    "red green blue white black brown yellow grey pink purple golden silver scarlet violet teal beige".split()
)
_THINGS = tuple(
    "kite drum lamp chair basket ladder clock mirror kettle bell coat rope spoon bottle carpet whistle".split()
)
_COUNTED = tuple(
    "pears plums figs lemons melons cherries grapes olives onions carrots beans nuts eggs shells stones coins".split()
)
_NUMBERS = tuple("zero one two three four five six seven eight".split())


@dataclass(frozen=True)
class _Kind:
    """Word lists, one word drawn from each, and the sentences made of the drawn words.

    `write` returns None for a combination that makes no item (one person twice).
    """

    lists: tuple[tuple[str, ...], ...]
    write: Callable[..., tuple[str, str] | None]

    @property
    def combinations(self) -> int:
        return math.prod(len(words) for words in self.lists)

    def item(self, number: int) -> tuple[str, str] | None:
        """Combination `number` in mixed radix, the last list turning fastest."""
        drawn = []
        for words in reversed(self.lists):
            number, digit = divmod(number, len(words))
            drawn.append(words[digit])
        return self.write(*reversed(drawn))


def _recall(name: str, colour: str, thing: str) -> tuple[str, str]:
    return f"{name} brings a {colour} {thing} .", f"the {thing} of {name} is {colour} today ."


def _reorder(name: str, other: str, colour: str, second: str, thing: str, last: str) -> tuple[str, str] | None:
    if name == other or colour == second or thing == last:
        return None
    prompt = f"{name} brings a {colour} {thing} and {other} brings a {second} {last} ."
    return prompt, f"{other} holds the {second} {last} and {name} holds the {colour} {thing} ."


def _sum(name: str, other: str, first: str, second: str, counted: str) -> tuple[str, str] | None:
    if name == other:
        return None
    total = _NUMBERS[_NUMBERS.index(first) + _NUMBERS.index(second)]
    prompt = f"{name} has {first} {counted} and {other} has {second} ."
    return prompt, f"{name} and {other} have {total} {counted} together ."


_ADDENDS = _NUMBERS[: len(_NUMBERS) // 2 + 1]  # zero to four, so that every sum has a name
_KINDS = {
    "recall": _Kind((_NAMES, _COLOURS, _THINGS), _recall),
    "reorder": _Kind((_NAMES, _NAMES, _COLOURS, _COLOURS, _THINGS, _THINGS), _reorder),
    "sum": _Kind((_NAMES, _NAMES, _ADDENDS, _ADDENDS, _COUNTED), _sum),
}
BUILTIN_KINDS = tuple(_KINDS)
_ENOUGH_FOR_EVERY_WORD = 512  # a word list has at most 16 words; a test proves it


def builtin_examples(kind: str, split: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` distinct (prompt, answer) pairs of one split, in an order drawn from the seed.

    Which split a combination belongs to is its own property, not the seed's: training data of one seed never holds a
    held-out item of another. A smaller count gives a prefix of a larger one. UserError: an unknown kind or split, a
    count below 1 or beyond what the kind has.
    """
    spec = _kind(kind)
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; {did_you_mean(split, SPLITS, f'it is one of {SPLITS}')}")
    if count < 1:
        raise UserError(f"builtin:{kind} was asked for {count} examples; ask for at least 1")
    # Seeding with a string and drawing with random() alone: both are stable over Python versions.
    draw = random.Random(f"megatron-jq {kind} {seed}")
    seen: set[int] = set()
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        if len(seen) == spec.combinations:
            raise UserError(f"builtin:{kind} has {len(pairs)} {split} examples, {count} were asked for; ask for fewer")
        number = int(draw.random() * spec.combinations)
        if number in seen:
            continue
        seen.add(number)
        pair = spec.item(number)
        if pair is not None and _is_heldout(kind, number) == (split == "heldout"):
            pairs.append(pair)
    return pairs


def builtin_texts(kind: str) -> list[str]:
    """Prompts and answers that hold every word of the kind at least once, to train its tokenizer on."""
    return [text for pair in builtin_examples(kind, "train", _ENOUGH_FOR_EVERY_WORD, seed=0) for text in pair]


def _kind(kind: str) -> _Kind:
    if kind not in _KINDS:
        names = ", ".join(f"builtin:{name}" for name in _KINDS)
        hint = did_you_mean(f"builtin:{kind}", [f"builtin:{name}" for name in _KINDS], f"there are {names}")
        raise UserError(f"--train-data builtin:{kind} is not a built-in task; {hint}")
    return _KINDS[kind]


def _is_heldout(kind: str, number: int) -> bool:
    digest = hashlib.sha256(f"{kind} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0
