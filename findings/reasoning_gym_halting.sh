#!/usr/bin/env bash
# reasoning-gym 0.1.25: game_of_life_halting's score_answer gives 1.0 to every text that is not empty, right or wrong:
# gold and answer are made booleans by bool(text), and bool("False") is True. Under it a policy is at reward 1 from its
# first step, and learns nothing, with a perfect curve.
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

print("python", sys.version.split()[0], "reasoning-gym", version("reasoning-gym"))
items = reasoning_gym.create_dataset("game_of_life_halting", size=20, seed=7)
golds = [items[i]["answer"] for i in range(20)]
scores = {text: {items.score_answer(text, items[i]) for i in range(20)} for text in ("True", "False", "I do not know")}
print("golds:", {gold: golds.count(gold) for gold in sorted(set(golds))}, "scores:", scores)
assert set(golds) == {"True", "False"}
assert scores == {text: {1.0} for text in scores}, "its judge tells right from wrong now"
PYTHON
