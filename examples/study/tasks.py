"""The study's tasks, as JSON lines: short sentences over some forty words, one token a word.

    paint   Mira takes a kite to the park .      Mira paints the kite red .    7 answer tokens, ln P near -26 at first
    repaint the same prompt                      paint's answer three times    19 answer tokens, ln P near -70
    colour  Mira takes a kite to the park .      red                           2 answer tokens, ln P near -7

The colour follows from the name alone. Held out are combinations of name, thing and place that training never shows.
Label noise gives an item the colour of the next name: a name has one wrong label, as in the two-label model.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.data.tokenizers import train_sentencepiece

NAMES = "Mira Theo Anna Boris Carla Dev Elsa Farid".split()
COLOURS = "red green blue white black brown grey pink".split()
THINGS = "kite drum lamp chair basket ladder clock bell".split()
PLACES = "park yard hall shop barn shed lane mill".split()
NUM_TRAIN = 448  # of the 512 combinations
#: The rationale given to supervised fine-tuning (part e): the two words of the prompt that the answer holds.
RATIONALE = "{name} {thing}"


@dataclass(frozen=True)
class Item:
    """One record: prompt, right answer, the answer that a flipped label gives, a rationale."""

    prompt: str
    answer: str
    other: str
    rationale: str


def items(task: str) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items without noise, in a fixed shuffled order. ValueError: no such task."""
    answers = {"paint": "{name} paints the {thing} {colour} .", "colour": "{colour}"}
    answers["repaint"] = " ".join([answers["paint"]] * 3)
    if task not in answers:
        raise ValueError(f"task {task!r} is none of {', '.join(answers)}")

    def item(row: int, thing: str, place: str) -> Item:
        name = NAMES[row]
        right, wrong = COLOURS[row], COLOURS[(row + 1) % len(COLOURS)]
        return Item(
            f"{name} takes a {thing} to the {place} .",
            answers[task].format(name=name, thing=thing, colour=right),
            answers[task].format(name=name, thing=thing, colour=wrong),
            RATIONALE.format(name=name, thing=thing),
        )

    chosen = [item(row, thing, place) for row in range(len(NAMES)) for thing in THINGS for place in PLACES]
    random.Random("megatron-jq study").shuffle(chosen)
    return chosen[:NUM_TRAIN], chosen[NUM_TRAIN:]


def flipped_rows(count: int, noise: float, seed: int) -> set[int]:
    """Rows of the training items whose label is flipped: exactly the nearest count to `noise` of them."""
    return set(random.Random(f"megatron-jq study flips {seed}").sample(range(count), round(noise * count)))


def write_task(folder: Path, task: str, *, noise: float = 0.0, seed: int = 0) -> None:
    """train.jsonl, heldout.jsonl (clean), flipped.jsonl (the training items with a wrong label), tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = items(task)
    flipped = flipped_rows(len(train), noise, seed)
    labels = [item.other if row in flipped else item.answer for row, item in enumerate(train)]
    _write(folder / "train.jsonl", train, labels)
    _write(folder / "heldout.jsonl", heldout, [item.answer for item in heldout])
    if flipped:
        _write(folder / "flipped.jsonl", [train[row] for row in sorted(flipped)], [labels[r] for r in sorted(flipped)])
    texts = [text for item in (*train, *heldout) for text in (item.prompt, item.answer)]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=None, model_type="word", byte_fallback=False)


def _write(path: Path, chosen: Sequence[Item], labels: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for item, label in zip(chosen, labels, strict=True):
            record = {"prompt": item.prompt, "answer": label, "rationale": item.rationale}
            file.write(json.dumps(record) + "\n")
