"""Jobs in forked processes, as many at once as asked for; each result is one JSON file, and a finished job is kept.

Whoever forks has imported Megatron-core once, so that a job does not pay for it. A result belongs to its job's `spec`:
a job whose spec has changed is run again. Jobs that were cut leave nothing that counts.
"""

import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One result. run(work) → JSON-able dict, in a process of its own; `work` is a new folder that is removed after it.

    spec: JSON-able, everything that the result follows from. after: names of jobs of the same part that must be there
    before. seconds: about how long it takes on one core, for the time left.
    """

    part: str
    name: str
    run: Callable[[Path], dict[str, Any]] = field(compare=False)
    spec: dict[str, Any] = field(default_factory=dict, compare=False)
    after: tuple[str, ...] = ()
    seconds: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.part}/{self.name}"


@dataclass(frozen=True)
class Result:
    """value: what the job returned. Seconds by the clock, and of CPU; commit of the code that ran."""

    value: dict[str, Any]
    wall_seconds: float
    cpu_seconds: float
    commit: str


def result_path(out: Path, job: Job) -> Path:
    return out / job.part / f"{job.name}.json"


def read_result(out: Path, job: Job) -> Result | None:
    """None where the job has not been done, or was done to another spec."""
    try:
        table = json.loads(result_path(out, job).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if table["spec"] != json.loads(json.dumps(job.spec)):
        return None
    return Result(table["value"], table["wall_seconds"], table["cpu_seconds"], table["commit"])


def run_jobs(jobs: Sequence[Job], out: Path, *, workers: int, commit: str, say: Callable[[str], None] = print) -> int:
    """Run what is missing, at most `workers` at once. Returns how many failed or had to wait for one that did."""
    waiting = [job for job in jobs if read_result(out, job) is None]
    done = {job.label for job in jobs} - {job.label for job in waiting}
    if done:
        say(f"{len(done)} of {len(jobs)} jobs are done already")
    progress = _Progress(len(jobs), len(done), waiting, workers, say)
    running: dict[int, tuple[Job, multiprocessing.Process]] = {}
    failed = 0
    while waiting or running:
        ready = [job for job in waiting if all(f"{job.part}/{name}" in done for name in job.after)]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            process = multiprocessing.get_context("fork").Process(target=_child, args=(job, out, commit, os.getpid()))
            process.start()
            running[process.sentinel] = (job, process)
        if not running:
            say(f"{len(waiting)} jobs wait for one that failed")
            return failed + len(waiting)
        for sentinel in wait(list(running)):
            job, process = running.pop(sentinel)
            process.join()
            if process.exitcode == 0:
                done.add(job.label)
            else:
                failed += 1
            progress.ended(job, process.exitcode, out)
    return failed


def _child(job: Job, out: Path, commit: str, parent: int) -> None:
    """The job's process: own output file, own folder, result written whole or not at all."""
    target = result_path(out, job)
    target.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(target.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8", errors="backslashreplace")
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="backslashreplace", buffering=1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    work = target.with_suffix(".work")
    shutil.rmtree(work, ignore_errors=True)  # of a job that was cut
    work.mkdir()
    code, began, before = 1, time.monotonic(), _cpu_seconds()
    try:
        value = job.run(work)
        table = {
            "spec": job.spec,
            "commit": commit,
            "wall_seconds": time.monotonic() - began,
            "cpu_seconds": _cpu_seconds() - before,
            "value": value,
        }
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(table), encoding="utf-8")
        partial.replace(target)
        shutil.rmtree(work)
        code = 0
    except BaseException:  # the process ends here: what went wrong is for the log
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # the interpreter's end is the parent's


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _end_with(parent: int) -> None:
    """A killed parent must not leave processes that write into a folder where it is started again."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Progress:
    """A line a finished job: how many, how long, time left by the jobs' own estimates scaled to what was seen."""

    def __init__(self, total: int, done: int, waiting: Sequence[Job], workers: int, say: Callable[[str], None]):
        self._total, self._done, self._say, self._workers = total, done, say, workers
        self._left = sum(job.seconds for job in waiting)
        self._finished, self._began = 0.0, time.monotonic()

    def ended(self, job: Job, code: int | None, out: Path) -> None:
        self._done += 1
        self._left -= job.seconds
        self._finished += job.seconds
        left = int(self._left * (time.monotonic() - self._began) / self._finished)
        result = read_result(out, job) if code == 0 else None
        took = (
            f"{result.wall_seconds:.1f} s ({result.cpu_seconds:.1f} s CPU)" if result else f"FAILED, exit code {code}"
        )
        more = "" if result else f"; see {result_path(out, job).with_suffix('.log')}"
        self._say(f"[{self._done}/{self._total}] {job.label}: {took}{more} | ETA {left // 60}:{left % 60:02d}")
