#!/usr/bin/env bash
# reasoning-gym 0.1.25: the sets of two neighbouring seeds are nearly one set. Item i is drawn from seed + i, so that
# seed 2 is seed 1 without its first item: of 500 questions each, 499 are the same. Held-out data by "another seed" is
# the training data, and an evaluation on it shows what was learnt by heart. Seeds that are further apart than either
# size share nothing but chance.
# Seen: Python 3.11, 2026-11. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "reasoning-gym==0.1.25"
"$folder/env/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import reasoning_gym


def questions(name, seed):
    return [item["question"] for item in reasoning_gym.create_dataset(name, size=500, seed=seed)]


print(f"Python {sys.version.split()[0]}, reasoning-gym {version('reasoning-gym')}")
for name in ("chain_sum", "gcd", "letter_counting"):
    train, held_out, apart = questions(name, 1), questions(name, 2), questions(name, 1001)
    shared, by_chance = len({*train} & {*held_out}), len({*train} & {*apart})
    print(f"{name}: seeds 1 and 2 share {shared} of 500 questions, seeds 1 and 1001 share {by_chance}")
    assert train[1:] == held_out[:-1], "seed 2 is no longer seed 1 without its first item"
    assert by_chance < 100
PYTHON
