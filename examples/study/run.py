#!/usr/bin/env python3
"""The study: the paper's mechanism, part by part, on this machine.

    python examples/study/run.py --report docs/study

Results go to --out, a JSON file per job. The same command continues a study that was cut; what is finished is kept.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a job is one core's; read when torch is imported
for known in ("Apex is not installed", "Transformer Engine and Apex are not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=known, category=UserWarning)  # Megatron-core's, at import

import torch  # noqa: E402

from examples.study.plan import PARTS, jobs_of_part  # noqa: E402
from examples.study.pool import run_jobs  # noqa: E402
from examples.study.report import write_report  # noqa: E402
from megatron_jq import streams  # noqa: E402


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] | None = None) -> int:
    """Returns the exit code: 3 where a job failed."""
    args = _parser().parse_args(argv)
    say = say or (lambda text: print(text, flush=True))
    torch.set_num_threads(1)
    commit = commit_of(ROOT)
    failed = 0
    jobs = [job for part in args.only for job in jobs_of_part(part, args.out)]
    if not args.no_run:
        failed = run_jobs(jobs, args.out, workers=args.workers, commit=commit, say=say)
    if args.report is not None:
        say(f"report: {write_report(args.out, args.report, command=' '.join(['python', *sys.argv]))}")
    return 3 if failed else 0


def commit_of(root: Path) -> str:
    """Of the code that runs; "unknown" outside a repository."""
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8", check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain", "megatron_jq"], capture_output=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def _parser() -> argparse.ArgumentParser:
    parts = "; ".join(f"{letter}: {what}" for letter, what in PARTS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"parts: {parts}")
    parser.add_argument(
        "--only", type=_letters, default=list(PARTS), metavar="a,b", help="parts to run (default: all of them)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="results (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.md and its pictures from all results")
    parser.add_argument("--no-run", action="store_true", help="run nothing: the report alone")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=_positive, default=cores, help="jobs at once (default: cores, %(default)s)")
    return parser


def _letters(text: str) -> list[str]:
    letters = text.split(",")
    if unknown := [letter for letter in letters if letter not in PARTS]:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return letters


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1")
    return int(text)


if __name__ == "__main__":
    streams.protect()
    sys.exit(main())
