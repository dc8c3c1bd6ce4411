"""Stands in for megatron_jq where a test is about the launch scripts: real scripts, real Slurm, ranks without a model.

A copy of launch/slurm lies beside it in a folder that is then the repository (`repository`). Environment:
STARTUP seconds without a handler, STEPS, STEP_SECONDS, SAVE_SECONDS, PREFLIGHT_SECONDS.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def seconds(name: str) -> float:
    return float(os.environ.get(name, "0"))


def report_step() -> None:
    """What Slurm gave to the step that this process belongs to."""
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    print(subprocess.run(["scontrol", "show", "step", step], capture_output=True, text=True).stdout)
    print("MEGATRON_JQ_HOME", Path(__file__).resolve().parents[1], flush=True)


def train(run_dir: Path) -> None:
    time.sleep(seconds("STARTUP"))
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    steps = int(os.environ.get("STEPS", "1"))
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    first = os.environ["RANK"] == "0"
    if first:
        (run_dir / "config.toml").write_text(f"train_iters = {steps}\n")
        report_step()
    done = int(tracker.read_text()) if tracker.exists() else 0
    while done < steps and not asked:
        began = time.monotonic()
        print(f"step {done + 1}", flush=True)
        while time.monotonic() < began + seconds("STEP_SECONDS"):
            time.sleep(0.02)
        done += 1
    time.sleep(seconds("SAVE_SECONDS"))
    if first:
        tracker.parent.mkdir(exist_ok=True)
        tracker.write_text(f"{done}\n")
    print("saved", flush=True)


def main() -> None:
    command, *flags = sys.argv[1:]
    print("command", *sys.argv[1:], flush=True)
    if command == "preflight":
        time.sleep(seconds("PREFLIGHT_SECONDS"))
    elif command == "train":
        train(Path(flags[flags.index("--run-dir") + 1]))


if __name__ == "__main__":
    main()
