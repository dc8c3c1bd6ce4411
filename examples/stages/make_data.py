#!/usr/bin/env python3
"""Made-up sums in words: text to pretrain on, and problems in GSM8K's format, with worked solutions.

    python examples/stages/make_data.py FOLDER

writes corpus.jsonl ({"text"}), train.jsonl and test.jsonl ({"question", "answer"}). The same files every time; no
question of test.jsonl stands in the other two, though every sum does.
"""

import itertools
import json
import random
import sys
from pathlib import Path

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "pens")
LARGEST, NUM_TEST, NUM_DOCUMENTS = 9, 64, 2000


def question(name: str, thing: str, first: int, second: int) -> str:
    return f"{name} has {first} {thing} and gets {second} more. How many {thing} has {name}?"


def solution(first: int, second: int) -> str:
    """A worked solution with the calculator's annotation, as GSM8K writes it."""
    return f"{first} + {second} = <<{first}+{second}={first + second}>>{first + second}"


def problem(name: str, thing: str, first: int, second: int) -> dict[str, str]:
    """A line of GSM8K's files."""
    return {
        "question": question(name, thing, first, second),
        "answer": f"{solution(first, second)}\n#### {first + second}",
    }


def document(problems: list[tuple]) -> dict[str, str]:
    """Some problems and their solutions as running text."""
    return {"text": " ".join(f"{question(*fields)} {solution(*fields[2:])}." for fields in problems)}


def main(folder: str) -> None:
    draw, numbers = random.Random("megatron-jq stages"), range(1, LARGEST + 1)
    problems = list(itertools.product(NAMES, THINGS, numbers, numbers))
    draw.shuffle(problems)
    test, train = problems[:NUM_TEST], problems[NUM_TEST:]
    rows = {
        "corpus.jsonl": [document(draw.sample(train, 4)) for _ in range(NUM_DOCUMENTS)],
        "train.jsonl": [problem(*fields) for fields in train],
        "test.jsonl": [problem(*fields) for fields in test],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        text = "".join(json.dumps(item) + "\n" for item in items)
        (Path(folder) / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
