"""Run the real command line: in ranks forked from this process, which imported everything once, or as a user starts it.

Forked ranks have what processes have (an environment, a standard error and an exit code each) and cost a second; no
launcher stands above them, as under srun. What they cannot show is Python's start and end, and torchrun's part.
"""

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# Imported here, before any fork, so that no rank pays for it again.
import megatron_jq.train.run  # noqa: F401
from megatron_jq.cli.main import main
from megatron_jq.config import parse_args
from tests.ports import free_port

parse_args([])  # tyro imports much at its first call

DEADLINE_SECONDS = 90
REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: A run of a second.
SMALL = ["train", "--config", str(REPOSITORY / "tests/e2e/small.toml"), "--device", "cpu"]


@dataclass(frozen=True)
class Ended:
    """What a process left: its exit code (negative: the signal that ended it) and what it wrote."""

    code: int
    out: str
    err: str


class Ranks:
    """`megatron-jq ARGV` on forked ranks, their output in `folder`.

    `prepare(rank)` runs in each before the command, to break things. `present`: the ranks that start; None: all.
    """

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        *,
        size: int = 1,
        prepare: Callable[[int], None] | None = None,
        present: list[int] | None = None,
    ):
        environment = _environment(size)
        context = multiprocessing.get_context("fork")
        self._output = {r: (folder / f"out.{r}", folder / f"err.{r}") for r in present or range(size)}
        self._processes = {
            rank: context.Process(target=_rank_main, args=(argv, rank, environment, output, prepare), daemon=True)
            for rank, output in self._output.items()
        }
        for process in self._processes.values():
            process.start()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._processes[rank].pid, number)

    def wait_for_steps(self, run_dir: Path, steps: int) -> None:
        wait_for_steps(run_dir, steps, lambda: all(process.is_alive() for process in self._processes.values()))

    def ended(self, *awaited: int) -> list[Ended]:
        """Join the awaited ranks (none named: all) and kill the others. A rank that hangs fails the test."""
        end = time.monotonic() + DEADLINE_SECONDS
        for rank in awaited or self._processes:
            self._processes[rank].join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank in awaited or self._processes if self._processes[rank].is_alive()]
        for process in self._processes.values():
            process.kill()
            process.join()
        read = {rank: [path.read_text() for path in pair] for rank, pair in self._output.items()}
        assert not hanging, f"ranks {hanging} still ran after {DEADLINE_SECONDS} s; their words: {read}"
        return [Ended(process.exitcode, *read[rank]) for rank, process in self._processes.items()]


def run(argv: list[str], folder: Path, *, size: int = 1, prepare: Callable[[int], None] | None = None) -> list[Ended]:
    """`megatron-jq ARGV` on forked ranks, to the end of all of them."""
    return Ranks(argv, folder, size=size, prepare=prepare).ended()


def start_processes(argv: list[str], size: int) -> list[subprocess.Popen]:
    """`python -m megatron_jq ARGV` on `size` processes with the variables that srun's scripts set, and no launcher."""
    command = [sys.executable, "-m", "megatron_jq", *argv]
    if size == 1:
        return [_start(command, {})]
    environment = _environment(size)
    return [_start(command, {**environment, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(size)]


def start_torchrun(argv: list[str], size: int) -> subprocess.Popen:
    """`torchrun --nproc-per-node SIZE -m megatron_jq ARGV`. It ends with 1 when a worker fails; see worker_codes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return _start([*launcher, "-m", "megatron_jq", *argv], {})


def finish(process: subprocess.Popen) -> Ended:
    """Wait for a started process. One that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        out, err = kill(process)
        raise AssertionError(f"still running after {DEADLINE_SECONDS} s\n{out}\n{err}") from None
    return Ended(process.returncode, out, err)


def workers(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """A launcher's ranks."""
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a launcher's short commands come and go
            environment = child.environ()
            if "RANK" in environment:
                ranks[int(environment["RANK"])] = child
    return ranks


def kill(process: subprocess.Popen) -> tuple[str, str]:
    """End a started process and its workers, which a launcher that is killed would leave behind. What it wrote."""
    for child in workers(process).values():
        child.kill()
    process.kill()
    return process.communicate()


def worker_codes(ended: Ended) -> dict[int, int]:
    """{rank: exit code} of torchrun's closing table, which names the ranks that failed before it ended the others."""
    matches = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", ended.err)
    return {int(rank): int(code) for rank, code in matches}


def wait_for_steps(run_dir: Path, steps: int, alive: Callable[[], bool]) -> None:
    """Return once `steps` steps are recorded."""
    end, path = time.monotonic() + DEADLINE_SECONDS, run_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert alive(), f"the run ended before step {steps}"
        assert time.monotonic() < end, f"no step {steps} within {DEADLINE_SECONDS} s"
        time.sleep(0.02)


def _environment(size: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _start(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
    ours = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment = {**ours, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY, env=environment)


def _rank_main(argv, rank, environment, output, prepare) -> None:
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if environment["WORLD_SIZE"] != "1":
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    code = 1
    try:
        if prepare is not None:
            prepare(rank)
        code = main(argv)
    except BaseException:  # for the test to read, as it would read a process's own
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown: the parent's pytest must not run twice
