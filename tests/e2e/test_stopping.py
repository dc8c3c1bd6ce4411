"""How a run ends before its last step: by a signal, by the clock, with its terminal; and how other commands end.
What is left is what an uninterrupted run leaves, once it is resumed.
"""

import fcntl
import json
import os
import pty
import shutil
import signal
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from megatron_jq import streams
from megatron_jq.checkpoint import convert
from megatron_jq.checkpoint import folder as folders
from megatron_jq.evaluate import run as evaluation
from megatron_jq.interrupts import ending_at_once
from megatron_jq.train.trainer import Trainer
from tests.e2e import launch
from tests.e2e.launch import SMALL, Ranks, finish, run, start_processes, start_torchrun, wait_for_steps
from tests.e2e.test_resume import metrics

ARGV = [*SMALL, "--train-iters", "10", "--no-tensorboard"]


def of(folder: Path) -> list[str]:
    return [*ARGV, "--run-dir", str(folder / "run")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[int, list[str]]:
    """Metrics by number of ranks (replicas)."""
    lines = {}
    for size in (1, 2):
        folder = tmp_path_factory.mktemp("uninterrupted")
        assert {rank.code for rank in run(of(folder), folder, size=size)} == {0}
        lines[size] = metrics(folder / "run")
    return lines


def resumed(folder: Path, size: int) -> list[str]:
    ended = run([*of(folder), "--resume"], folder, size=size)
    assert {rank.code for rank in ended} == {0}, ended
    assert "goes on from" in ended[0].out or "resumes" in ended[0].out
    return metrics(folder / "run")


def slow_steps(rank: int) -> None:
    step = Trainer.step

    def slow(self, number):
        time.sleep(0.3)
        return step(self, number)

    Trainer.step = slow


def kept_steps(folder: Path) -> list[int]:
    return sorted(folders.step_of(path) for path in (folder / "run" / "checkpoints").glob("iter_*"))


def test_a_run_saves_by_time_and_loses_little_to_a_kill(uninterrupted, tmp_path):
    """Every 0.5 s of steps of 0.3 s and more: two of the checkpoints stay, and the last one at the end."""

    def dies_in_step_7(rank: int) -> None:
        slow_steps(rank)
        step = Trainer.step

        def dying(self, number):
            if number == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number)

        Trainer.step = dying

    by_time = ["--save-interval-minutes", "0.00833"]
    for rank in run([*of(tmp_path), *by_time], tmp_path, size=2, prepare=dies_in_step_7):
        assert rank.code == -signal.SIGKILL
    saved = kept_steps(tmp_path)
    assert len(saved) == 2 and 5 <= saved[-1] <= 7
    assert all(folders.read_manifest(path).by_time for path in (tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert resumed(tmp_path, 2) == uninterrupted[2]
    assert kept_steps(tmp_path) == [saved[-1], 10]


def test_a_run_that_should_not_save_by_time_does_not(tmp_path):
    argv = [*of(tmp_path), "--train-iters", "3", "--save-interval-minutes", "0"]
    assert run(argv, tmp_path, prepare=slow_steps)[0].code == 0
    assert kept_steps(tmp_path) == [3]


def test_a_run_ends_by_time_on_all_ranks_and_says_what_is_left(uninterrupted, tmp_path):
    """Rank 0's clock decides: rank 1 would go on for ever."""

    def without_a_clock(rank: int) -> None:
        slow_steps(rank)
        if rank == 1:
            time.monotonic = lambda: 0.0

    argv = [*of(tmp_path), "--exit-duration-in-mins", "0.02"]
    ended = run(argv, tmp_path, size=2, prepare=without_a_clock)
    assert [rank.code for rank in ended] == [0, 0], ended
    done = len(metrics(tmp_path / "run"))
    assert 1 <= done < 10 and kept_steps(tmp_path) == [done]
    assert f"--exit-duration-in-mins: step {done} is done and saved" in ended[0].out
    assert f"{10 - done} steps are left" in ended[0].out
    assert resumed(tmp_path, 2) == uninterrupted[2]


def test_a_run_whose_terminal_goes_away_saves_and_ends(uninterrupted, tmp_path):
    """As an SSH connection that breaks: SIGHUP, and from then on every write to the terminal fails."""
    ours, child_end = pty.openpty()

    def on_the_terminal(rank: int) -> None:
        os.setsid()
        fcntl.ioctl(child_end, termios.TIOCSCTTY, 0)
        os.close(ours)
        os.dup2(child_end, 1), os.dup2(child_end, 2), os.close(child_end)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        streams.protect()  # as `program` does
        slow_steps(rank)

    ranks = Ranks(of(tmp_path), tmp_path, prepare=on_the_terminal)
    ranks.wait_for_steps(tmp_path / "run", 2)
    os.close(child_end), os.close(ours)
    assert ranks.ended()[0].code == 0
    done = len(metrics(tmp_path / "run"))
    assert 2 <= done < 10 and kept_steps(tmp_path) == [done]
    assert resumed(tmp_path, 1) == uninterrupted[1]


def test_torchrun_passes_ctrl_c_on_and_the_run_is_saved(uninterrupted, tmp_path):
    """The terminal sends it to torchrun, which sends it to the ranks; they may get it from both."""
    argv = [*of(tmp_path), "--train-iters", "4000"]
    process = start_torchrun(argv, 2)
    wait_for_steps(tmp_path / "run", 2, lambda: process.poll() is None)
    ranks = launch.workers(process)
    process.send_signal(signal.SIGINT)
    for rank in ranks.values():
        rank.send_signal(signal.SIGINT)
    ended = finish(process)
    done = len(metrics(tmp_path / "run"))
    assert done < 4000 and kept_steps(tmp_path) == [done]
    assert f"SIGINT: step {done} is done and saved" in ended.out and f"{4000 - done} steps are left" in ended.out
    assert "SIGINT: ends after this step and saves it" in ended.err
    assert not launch.worker_codes(ended) and "megatron_jq/" not in ended.err  # torchrun's own traceback alone
    ours = json.loads(metrics(tmp_path / "run")[1])
    assert ours["loss"] == json.loads(uninterrupted[2][1])["loss"]


COMMANDS = {
    "train": lambda folder: of(folder),
    "evaluate": lambda folder: ["evaluate", "--load", str(folder), "--output", str(folder / "out")],
    "convert": lambda folder: ["convert", "inspect", "--load", str(folder)],
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS)
def test_before_its_work_a_command_ends_with_one_line(command, number, tmp_path):
    """While packages are imported: no traceback, no file."""
    [process] = start_processes(COMMANDS[command](tmp_path), 1)
    while sum(psutil.Process(process.pid).cpu_times()[:2]) < 1:
        time.sleep(0.02)
    process.send_signal(number)
    ended = finish(process)
    assert ended.code == -number and ended.out == ""
    assert ended.err == f"megatron-jq: ended by {signal.Signals(number).name} before it was done\n"
    assert list(tmp_path.iterdir()) == []


def signalled_at(module, name: str):
    """Ranks that run as `program` does and receive Ctrl-C when module.name is called."""
    assert callable(getattr(module, name, None)), name

    def prepare(rank: int) -> None:
        main = launch.main

        def framed(argv: list[str]) -> int:
            with ending_at_once("megatron-jq"):
                return main(argv)

        def signalling(*_, **__):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

        launch.main = framed
        setattr(module, name, signalling)

    return prepare


def test_what_is_half_written_is_removed(tmp_path):
    """A conversion between two files, an evaluation of a Hugging Face folder as it loads the weights."""
    argv = [*of(tmp_path), "--train-iters", "1", "--tokenizer-vocab-size", "300"]
    assert run(argv, tmp_path)[0].code == 0
    checkpoints, hf = str(tmp_path / "run" / "checkpoints"), tmp_path / "hf"
    to_hf = ["convert", "megatron-to-hf", "--load", checkpoints, "--hf", str(hf)]
    half = ["convert", "hf-to-megatron", "--hf", str(hf), "--save", str(tmp_path / "save")]
    before = sorted(path.name for path in tmp_path.iterdir() if "." not in path.name)
    [ended] = run(to_hf, tmp_path, prepare=signalled_at(convert, "_check_written"))
    assert ended.code == -signal.SIGINT and "Traceback" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(("out.", "err."))) == before
    assert run(to_hf, tmp_path)[0].code == 0
    [ended] = run(half, tmp_path, prepare=signalled_at(folders, "commit"))
    assert ended.code == -signal.SIGINT and not (tmp_path / "save").exists()

    output = tmp_path / "evaluation"
    argv = ["evaluate", "--hf", str(hf), "--eval-data", "builtin:recall", "--output", str(output), "--device", "cpu"]
    [ended] = run([*argv, "--eval-samples", "2"], tmp_path, prepare=signalled_at(evaluation, "load_engine"))
    assert ended.code == -signal.SIGINT and ended.err.splitlines()[-1].startswith("megatron-jq: ended by SIGINT"), ended
    assert {path.name for path in output.iterdir()} <= {"samples.jsonl"}
    shutil.rmtree(hf)
