"""F2: items of the package reasoning-gym as prompts and gold answers. Its own scoring is never asked.

A source is "reasoning-gym:NAME[:KEY=VALUE,…]", such as reasoning-gym:chain_sum:max_terms=4,size=2000. Two keys are the
product's:

    size  distinct questions (default: 1024 to train on, 128 held out); a smaller size gives the first ones of a larger
    seed  which ones (default 0). The package draws item i from its own seed + i, so that its seeds 1 and 2 share nearly
          all items; ours are 2^20 of its seeds apart.

Whether a question is trained on or held out is decided by its own SHA-256, one in five being held out: no question is
both, whatever the seeds, sizes and settings of two sources. A question that comes again is passed over.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import io
import re
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_jq.data.reasoning_gym_sets import CHECKED_VERSION, LONGEST_ANSWER, REFUSED, SETS, GymSet
from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.sources import REASONING_GYM_PREFIX, is_reasoning_gym
from megatron_jq.toml_files import did_you_mean, nearest

PACKAGE = "reasoning-gym"
INSTALL = "pip install 'megatron-jq[reasoning-gym]'"
FORM = "reasoning-gym:NAME[:KEY=VALUE,…]"
DEFAULT_SIZE = {"train": 1024, "heldout": 128}
HELDOUT_ONE_IN = 5
SEEDS_APART = 2**20  # and so most items that one source may look at
_LARGEST_SEED = 4095  # the package's seed stays below 2^32
_GIVES_UP_AFTER = 2000  # items on end without a new question of the split
_SECONDS_BETWEEN_LINES = 10.0
_OURS = {"size": int, "seed": int}
_KINDS = {int: "whole number", float: "number", bool: "true or false"}


@dataclass(frozen=True)
class GymSource:
    """A source, read and checked. settings: keys of the set. label: flag and source, for errors."""

    row: GymSet
    size: int | None
    seed: int
    settings: dict[str, Any]
    source: str
    label: str


@dataclass(frozen=True)
class GymItems:
    """What a source gave. data_format: how answers are compared (formats/table.py). notes: what else is to be said."""

    pairs: tuple[Pair, ...]
    data_format: str
    notes: tuple[str, ...]


def read_reasoning_gym(source: str, split: str, *, flag: str = "--train-data") -> GymItems:
    """Return the source's items of a split ("train" or "heldout"), with the place "SOURCE[row]" each.

    Prints a line every ten seconds while it takes longer. UserError: the package is absent, a set that is refused or
    unknown, a key or a value that the set does not have, an item that cannot be a gold answer, fewer than `size`.
    """
    if split not in DEFAULT_SIZE:
        raise UserError(f"{flag} {source}: sets of {PACKAGE} have no third split; give a file")
    with _quiet():
        spec = _parsed(source, flag)
        dataset = _dataset(spec)
    size = spec.size or DEFAULT_SIZE[split]
    pairs: list[Pair] = []
    answers: dict[str, str] = {}  # of every question of the split so far
    repeated = ambiguous = unanswered = 0
    number = last_new = -1
    began = said = time.monotonic()
    while len(pairs) < size and number < min(last_new + _GIVES_UP_AFTER, SEEDS_APART - 1):
        number += 1
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{spec.label}: {len(pairs)} of {size} items after {said - began:.0f} s", flush=True)
        question, answer = _item(spec, dataset, number)
        if is_heldout(question) != (split == "heldout"):
            continue
        if spec.row.open and re.search(spec.row.open, question):
            unanswered += 1
            continue
        if question in answers:
            repeated += 1
            ambiguous += answers[question] != answer
            continue
        answers[question], last_new = answer, number
        pairs.append(Pair(question, answer, f"{source}[{len(pairs)}]"))
    if len(pairs) < size:
        kind = "held-out" if split == "heldout" else "training"
        raise UserError(
            f"{spec.label}: {len(pairs)} distinct {kind} questions among {number + 1} items, {size} were asked for; "
            f"ask for fewer (size={len(pairs)}), or widen its settings: {_keys_of(spec.row.name)}"
        )
    numbers = "reasoning-gym-numbers" if spec.row.numbers else "reasoning-gym"
    return GymItems(tuple(pairs), numbers, tuple(_notes(repeated, ambiguous, unanswered)))


def without_size(source: str) -> str:
    """The same source with its split's own size: how a validation split is named that a training source brings."""
    name, _, keys = source.removeprefix(REASONING_GYM_PREFIX).partition(":")
    rest = ",".join(key for key in keys.split(",") if key.partition("=")[0].strip() != "size")
    return f"{REASONING_GYM_PREFIX}{name}" + (f":{rest}" if rest else "")


def package_of(source: str) -> tuple[str, ...]:
    """Distributions beside this one that make the source's examples: their versions stand in checkpoints."""
    return (PACKAGE,) if is_reasoning_gym(source) else ()


def is_heldout(question: str) -> bool:
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def _parsed(source: str, flag: str) -> GymSource:
    label = f"{flag} {source}"
    name, *keys = source.removeprefix(REASONING_GYM_PREFIX).split(":")
    if not name or len(keys) > 1:
        raise UserError(f"{label}: write {FORM}")
    row = _row(name, label)
    types = _types_of(name)
    values: dict[str, Any] = {}
    for key, text in _key_values(keys[0] if keys else "", label):
        if key not in types:
            keys = f"it has {_keys_of(name)}"
            match = nearest(key, types)
            hint = f"did you mean {match}? {keys}" if match else keys
            raise UserError(f"{label}: {name} has no key {key!r} that can be set here; {hint}")
        if key in values:
            raise UserError(f"{label}: {key} is given twice")
        values[key] = _value(text, types[key], f"{label}: {key}={text}")
    size, seed = values.pop("size", None), values.pop("seed", 0)
    if size is not None and size < 1:
        raise UserError(f"{label}: size={size}; ask for at least 1")
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"{label}: seed={seed} is not from 0 to {_LARGEST_SEED}")
    return GymSource(row, size, seed, values, source, label)


def _row(name: str, label: str) -> GymSet:
    """UserError: a set that is refused, that nobody has checked, or that does not exist; the package is absent."""
    if name in REFUSED:
        raise UserError(f"{label} is refused: {REFUSED[name]}; these can be used: {', '.join(SETS)}")
    if name in SETS:
        _import(label)
        return SETS[name]
    hint = did_you_mean(name, [*SETS, *REFUSED], f"there are {', '.join(SETS)}")
    try:
        installed = name in _import(label).DATASETS
    except UserError:
        installed = False
    if installed:
        raise UserError(f"{label} is refused: nobody has checked it; these can be used: {', '.join(SETS)}")
    raise UserError(f"{label} is no set of {PACKAGE}; {hint}")


def _import(label: str = "--train-data reasoning-gym:"):
    """The package's table of sets and how one is made."""
    try:
        importlib.metadata.version(PACKAGE)
        importlib.import_module("reasoning_gym")
        return importlib.import_module("reasoning_gym.factory")
    except ImportError as error:  # PackageNotFoundError is one
        raise UserError(f"{label} needs the package {PACKAGE}: {INSTALL} ({error})") from error


def _types_of(name: str) -> dict[str, type]:
    """Key → its type, of those that a source can set: ours, and the set's that are no lists or texts."""
    _, settings = _import().DATASETS[name]
    hints = typing.get_type_hints(settings)
    fields = [field.name for field in dataclasses.fields(settings) if field.name not in _OURS]
    return {**{key: hints[key] for key in fields if hints[key] in _KINDS}, **_OURS}


def _keys_of(name: str) -> str:
    with _quiet():
        return ", ".join(f"{key} ({_KINDS[kind]})" for key, kind in _types_of(name).items())


def _key_values(text: str, label: str) -> Iterator[tuple[str, str]]:
    for item in text.split(",") if text else []:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not (key and equals and value):
            raise UserError(f"{label}: {item!r} is no KEY=VALUE; write {FORM}")
        yield key, value


def _value(text: str, kind: type, place: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{place}: expected {_KINDS[kind]}") from error


def _dataset(spec: GymSource):
    """UserError: settings that the set itself refuses."""
    factory, seed = _import(spec.label), spec.seed * SEEDS_APART
    try:
        return factory.create_dataset(spec.row.name, seed=seed, size=SEEDS_APART, **spec.settings)
    except (AssertionError, ValueError, TypeError, ArithmeticError, LookupError) as error:  # the set's own checks
        raise UserError(f"{spec.label}: {spec.row.name} refuses its settings: {_reason(error)}") from error


def _item(spec: GymSource, dataset, number: int) -> tuple[str, str]:
    """Question and gold answer. UserError: the set fails, or the answer is none that can be scored."""
    place = f"{spec.label}: item {number} of {spec.row.name}"
    try:
        with _quiet():
            item = dataset[number]
    except MemoryError:
        raise
    except Exception as error:  # the set's own code may raise anything: all ranks are told
        raise UserError(f"{place} cannot be made with these settings: {_reason(error)}") from error
    question, answer = item["question"], item["answer"]
    fault = None
    if not isinstance(question, str) or not question.strip():
        fault = "has no question"
    elif not isinstance(answer, str) or not answer.strip():
        fault = "has an empty answer"
    elif len(answer.strip().splitlines()) > 1:
        fault = f"has an answer of {len(answer.strip().splitlines())} lines"
    elif len(answer.strip()) > LONGEST_ANSWER:
        fault = f"has an answer of {len(answer.strip())} characters, more than {LONGEST_ANSWER}"
    if fault is not None:
        shown = f"question {str(question)[:200]!r}, answer {str(answer)[:200]!r}"
        raise UserError(f"{place} {fault}; change its settings ({shown})")
    return question, answer.strip()


def _notes(repeated: int, ambiguous: int, unanswered: int) -> Iterator[str]:
    installed = importlib.metadata.version(PACKAGE)
    if installed != CHECKED_VERSION:
        yield f"{PACKAGE} {installed} is installed; its sets were checked in {CHECKED_VERSION}"
    if repeated:
        plural = "s" if repeated > 1 else ""
        other = f", {ambiguous} of them with another answer" if ambiguous else ""
        yield f"{repeated} item{plural} left out whose question was there already{other}"
    if unanswered:
        yield f"{unanswered} item{'s' if unanswered > 1 else ''} left out that any answer solves"


def _reason(error: Exception) -> str:
    words, kind = str(error).strip().splitlines(), type(error).__name__
    if isinstance(error, AssertionError) and words:  # a sentence for the user
        return words[0]
    return f"{kind}: {words[0]}" if words else kind


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the package prints (dots, while it searches) is not the run's output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
