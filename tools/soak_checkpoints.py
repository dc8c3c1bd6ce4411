#!/usr/bin/env python3
"""Kill a run again and again, some of the times inside a save, and compare what it leaves with an uninterrupted run's.

    python tools/soak_checkpoints.py --kills 20        # about 10 minutes on two cores

Ranks are processes of their own, killed all at once with SIGKILL. Every other kill waits for a checkpoint that is being
written. At the end metrics.jsonl must be equal, line by line, but for times and memory, and so must the last weights
and moments. Exit code 1 where they are not.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_jq.cli.parser import run_tool, tool_parser
from megatron_jq.records import MEASURED

LAYOUTS = {
    "TP2, plain optimizer": ["--tensor-model-parallel-size", "2"],
    "PP2, plain optimizer": ["--pipeline-model-parallel-size", "2"],
    "DP2, distributed optimizer": ["--use-distributed-optimizer"],
    "TP2, distributed optimizer, asynchronous": [
        "--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--async-save",
    ],
}  # fmt: skip
RUN = (
    "--prompts-per-step 4 --num-rationales 4 --rationale-budget 8 --train-examples 32 --eval-examples 4 "
    "--sample-interval 0 --device cpu --no-tensorboard --resume --keep-last 3"
).split()
WAIT_SECONDS = 300


@dataclass(frozen=True)
class Outcome:
    layout: str
    kills: int
    inside_saves: int
    lost_steps: int  # done, not saved, and done again
    equal: bool


def start(folder: Path, flags: list[str]) -> list[subprocess.Popen]:
    """Both ranks, without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_jq", "train", *RUN, "--run-dir", str(folder / "run"), *flags]
    ranks = []
    for rank in range(2):
        with open(folder / f"log.{rank}", "ab") as log:
            environment = {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return ranks


def finish(folder: Path, flags: list[str]) -> None:
    codes = [rank.wait(timeout=WAIT_SECONDS) for rank in start(folder, flags)]
    assert codes == [0, 0], f"exit codes {codes}; see {folder}/log.0"


def steps(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(folder: Path) -> int:
    names = [path.name for path in (folder / "run" / "checkpoints").glob("iter_*")]
    return max((int(name.removeprefix("iter_")) for name in names), default=0)


def kill_once(folder: Path, flags: list[str], inside_save: bool, dice: random.Random) -> tuple[bool, int]:
    """(whether the kill fell into a save, steps that were lost). The run must get further than before first."""
    before, ranks = steps(folder), start(folder, flags)
    wanted, end = saved(folder) + dice.randint(1, 6), time.monotonic() + WAIT_SECONDS
    while steps(folder) < wanted or (inside_save and not partial(folder)):
        if any(rank.poll() is not None for rank in ranks):
            break  # it came to its end
        assert time.monotonic() < end, f"no progress since step {before} within {WAIT_SECONDS} s; see {folder}/log.0"
        time.sleep(0.0005 if inside_save else 0.01)
    if not inside_save:
        time.sleep(dice.random() * 0.3)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.wait()
    return partial(folder), max(0, steps(folder) - saved(folder))


def partial(folder: Path) -> bool:
    return bool(list((folder / "run" / "checkpoints").glob(".iter_*.partial")))


def figures(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open(encoding="utf-8")]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def last_files(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "run" / "checkpoints").glob("iter_*"))
    return {path.name: path.read_bytes() for path in newest.glob("*.distcp")}


def soak(layout: str, kills: int, iterations: int, dice: random.Random, bar: tqdm) -> Outcome:
    flags = [*LAYOUTS[layout], "--train-iters", str(iterations), "--save-interval", "4"]
    with tempfile.TemporaryDirectory() as scratch:
        uninterrupted, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        uninterrupted.mkdir(), killed.mkdir()
        finish(uninterrupted, flags)
        inside = lost = 0
        for number in range(kills):
            hit, gone = kill_once(killed, flags, number % 2 == 1, dice)
            inside, lost = inside + hit, lost + gone
            bar.update(1)
        finish(killed, flags)
        equal = figures(uninterrupted) == figures(killed) and last_files(uninterrupted) == last_files(killed)
    return Outcome(layout, kills, inside, lost, equal)


def main() -> int:
    """Returns the exit code."""
    return run_tool(__file__, _run)


def _run() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--kills", type=int, default=20, help="over all layouts")
    parser.add_argument("--train-iters", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice, share = random.Random(options.seed), -(-options.kills // len(LAYOUTS))
    print("| layout | kills | inside a save | steps done twice | equal |\n|---|---|---|---|---|")
    failed = False
    with tqdm(total=share * len(LAYOUTS), unit="kill", disable=None) as bar:
        for layout in LAYOUTS:
            outcome = soak(layout, share, options.train_iters, dice, bar)
            failed |= not outcome.equal
            cells = (layout, outcome.kills, outcome.inside_saves, outcome.lost_steps, "yes" if outcome.equal else "NO")
            tqdm.write("| " + " | ".join(map(str, cells)) + " |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
