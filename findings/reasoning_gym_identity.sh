#!/usr/bin/env bash
# reasoning-gym 0.1.25: simple_equations asks some questions that every number answers, "Solve for f: 0 = 0", and has one
# number as the gold answer; any other scores 0. Two coefficients cancelled, and the unknown that had been drawn before
# stays as the answer. Two of the first 6,000 items of seed 0; likelihood of that gold is noise that no policy learns.
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

print(f"Python {sys.version.split()[0]}, reasoning-gym {version('reasoning-gym')}")
equations = reasoning_gym.create_dataset("simple_equations", size=6000, seed=0)
identities = [item for item in equations if item["metadata"]["equation"] == "0 = 0"]
for item in identities:
    other = str(int(item["answer"]) + 1)
    scores = [equations.score_answer(answer, item) for answer in (item["answer"], other)]
    print(f"{item['question']!r}: gold {item['answer']}; score of {item['answer']}: {scores[0]}, of {other}: {scores[1]}")
    assert scores[0] == 1.0 and scores[1] < 0.1
assert len(identities) == 2, len(identities)
PYTHON
