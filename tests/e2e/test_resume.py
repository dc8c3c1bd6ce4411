"""A run may be killed at any point and taken up again: what it leaves is what an uninterrupted run leaves."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.run_files import CLAIM, LOCK
from megatron_jq.records import MEASURED
from megatron_jq.train import run_directory
from megatron_jq.train.recorder import Recorder
from megatron_jq.train.trainer import Trainer
from tests.e2e.launch import SMALL, Ranks, run

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer"]
LONG = [*SMALL, "--train-iters", "12", "--save-interval", "3", "--no-tensorboard"]


def metrics(run_dir: Path) -> list[str]:
    """metrics.jsonl, line by line, without times and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [json.dumps({key: value for key, value in line.items() if key not in MEASURED}) for line in lines]


def saved_names(save: Path) -> list[str]:
    """What is in a folder of checkpoints beside the run's claim and lock."""
    return sorted(path.name for path in save.iterdir() if path.name not in (CLAIM, LOCK))


def forget(run_dir: Path, *steps: int) -> None:
    """Remove the run's last checkpoints, as if it had been killed before it saved them."""
    for step in steps:
        shutil.rmtree(run_dir / "checkpoints" / folders.folder_name(step))
    newest = next(iter(folders.saved_steps(run_dir / "checkpoints")))
    (run_dir / "checkpoints" / folders.TRACKER).write_text(f"{newest}\n")


def finished(argv: list[str], folder: Path, size: int = 2, prepare=None) -> str:
    """Run to the end; rank 0's words."""
    ended = run(argv, folder, size=size, prepare=prepare)
    assert [rank.code for rank in ended] == [0] * size, ended
    return ended[0].out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs: layout → run directory."""
    runs = {}

    def of(*flags: str, size: int = 2) -> Path:
        if flags not in runs:
            folder = tmp_path_factory.mktemp("whole")
            finished([*LONG, "--run-dir", str(folder / "run"), *flags], folder, size)
            runs[flags] = folder / "run"
        return runs[flags]

    return of


def slow_commit(rank: int) -> None:
    """Half a second between a checkpoint's last file and its name."""
    commit = folders.commit

    def late(*arguments, **keywords):
        time.sleep(0.5)
        return commit(*arguments, **keywords)

    folders.commit = late


def kill_all(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.signal(rank, signal.SIGKILL)
    assert [rank.code for rank in ranks.ended()] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("flags", [TP2, [*PP2, *SHARDED]], ids=["TP2 plain", "PP2 distributed optimizer"])
def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(flags, whole, tmp_path):
    expected = whole(*flags)
    run_dir, dice = tmp_path / "run", random.Random(str(flags))
    argv = [*LONG, "--run-dir", str(run_dir), *flags, "--resume"]

    ranks = Ranks(argv, tmp_path, size=2)
    ranks.wait_for_steps(run_dir, dice.randint(1, 8))
    time.sleep(dice.random() * 0.1)
    kill_all(ranks)

    ranks = Ranks(argv, tmp_path, size=2, prepare=slow_commit)
    before, end = set(run_dir.glob("checkpoints/iter_*")), time.monotonic() + 60
    while not list(run_dir.glob("checkpoints/.iter_*.partial/.metadata")):
        assert time.monotonic() < end
        time.sleep(0.01)
    kill_all(ranks)
    assert set(run_dir.glob("checkpoints/iter_*")) == before  # it had no name yet

    finished(argv, tmp_path)
    assert metrics(run_dir) == metrics(expected)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (expected / "checkpoints").iterdir())
    for step in (3, 12):
        assert same_tensors(expected, run_dir, step)


def same_tensors(one: Path, other: Path, step: int) -> bool:
    """Both wrote the same bytes: the file of every rank holds the same tensors in the same order."""
    names = [f"checkpoints/{folders.folder_name(step)}/__{rank}_0.distcp" for rank in (0, 1)]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_any_rank_ends_the_step_saves_and_exits_with_0(number, whole, tmp_path):
    run_dir = tmp_path / "run"
    argv = [*LONG, "--run-dir", str(run_dir), *TP2, "--async-save"]
    ranks = Ranks(argv, tmp_path, size=2)
    ranks.wait_for_steps(run_dir, 4)
    for _ in range(2):  # from the launcher and from the terminal
        ranks.signal(1, number)
    ended = ranks.ended()
    assert [rank.code for rank in ended] == [0, 0], ended
    steps = len(metrics(run_dir))
    assert 4 <= steps < 12 and f"step {steps} is done and saved" in ended[0].out
    assert folders.find(run_dir / "checkpoints").name == folders.folder_name(steps)
    finished([*argv, "--resume"], tmp_path)
    assert metrics(run_dir) == metrics(whole(*TP2))


def stall(rank: int) -> None:
    def step(self, number):
        (Path(self.config.training.run_dir) / "stalled").touch()
        time.sleep(60)

    Trainer.step = step


def test_a_second_signal_exits_at_once(tmp_path):
    run_dir = tmp_path / "run"
    ranks = Ranks([*LONG, "--run-dir", str(run_dir)], tmp_path, prepare=stall)
    end = time.monotonic() + 60
    while not (run_dir / "stalled").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    ranks.signal(0, signal.SIGTERM)
    time.sleep(1.3)
    began = time.monotonic()
    ranks.signal(0, signal.SIGTERM)
    assert ranks.ended()[0].code == -signal.SIGTERM and time.monotonic() - began < 5


def newest_shard(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000012" / "__1_0.distcp"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "does not match its checksum": flip,
    "is missing": Path.unlink,
    "bytes instead of": lambda path: os.truncate(path, 1000),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(words, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole(*TP2), run_dir)
    DAMAGE[words](newest_shard(run_dir))
    argv = [*LONG, "--run-dir", str(run_dir), *TP2]
    out = finished([*argv, "--resume"], tmp_path)
    assert "iter_0000012 is damaged and passed over" in out and words in out and "__1_0.distcp" in out
    assert metrics(run_dir) == metrics(whole(*TP2))

    DAMAGE[words](newest_shard(run_dir))
    named = [*SMALL, "--run-dir", str(tmp_path / "new"), *TP2, "--load", str(newest_shard(run_dir).parent)]
    for rank in run(named, tmp_path, size=2):
        assert rank.code == 2 and words in rank.err and len(rank.err.splitlines()) == 1
    assert not (tmp_path / "new" / "config.toml").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds one checkpoint of the tiny policy, not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_all_ranks_and_leaves_the_checkpoint_before(small_disk, tmp_path):
    save = small_disk / "checkpoints"
    argv = [*LONG, "--run-dir", str(tmp_path / "run"), *TP2, "--save", str(save)]
    for rank in run(argv, tmp_path, size=2):
        assert rank.code == 3 and len(rank.err.splitlines()) == 1, rank.err
        assert f"checkpoint of step 6 in {save} could not be written: rank" in rank.err
        assert "No space left on device" in rank.err
    assert saved_names(save) == ["iter_0000003", folders.TRACKER]
    continued = [*SMALL, "--run-dir", str(tmp_path / "new"), "--train-iters", "4", "--load", str(save)]
    finished([*continued, "--save", str(tmp_path / "elsewhere")], tmp_path, size=1)
    assert [json.loads(line)["step"] for line in metrics(tmp_path / "new")] == [3]


@pytest.mark.parametrize("extra", [[], ["--async-save"]], ids=["now", "meanwhile"])
def test_a_write_that_fails_on_one_rank_ends_all_of_them(extra, tmp_path):
    def limit_file_size(rank: int) -> None:
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    argv = [*LONG, "--run-dir", str(tmp_path / "run"), *TP2, *extra]
    for rank in run(argv, tmp_path, size=2, prepare=limit_file_size):
        assert rank.code == 3 and len(rank.err.splitlines()) == 1, rank.err
        assert "checkpoint of step 3" in rank.err and "rank 1: File too large" in rank.err
    assert saved_names(tmp_path / "run" / "checkpoints") == []


def test_a_step_that_cannot_be_recorded_ends_all_ranks_and_is_done_again(whole, tmp_path):
    run_dir = tmp_path / "run"

    def fill_the_disk(rank: int) -> None:
        record = Recorder.record

        def late(self, metrics):
            if metrics.step == 4:
                size = (run_dir / "metrics.jsonl").stat().st_size
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
            record(self, metrics)

        Recorder.record = late

    argv = [*LONG, "--run-dir", str(run_dir), *TP2]
    codes = run(argv, tmp_path, size=2, prepare=fill_the_disk)
    assert [rank.code for rank in codes] == [3, 3], codes
    for rank in codes:
        assert "step 4: metrics.jsonl could not be written: File too large" in rank.err
    finished([*argv, "--resume"], tmp_path)
    assert metrics(run_dir) == metrics(whole(*TP2))


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *TP2, "--save", str(tmp_path / "file" / "checkpoints")]
    for rank in run(argv, tmp_path, size=2):
        assert rank.code == 2 and "--save" in rank.err and "Not a directory" in rank.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_stops_while_a_checkpoint_is_written_ends_that_first(whole, tmp_path):
    run_dir = tmp_path / "run"

    def fail_in_step_3(rank: int) -> None:
        slow_commit(rank)
        step = Trainer.step

        def poisoned(self, number):
            if number == 3 and rank == 1:
                weight = next(parameter for _, parameter in self.model.named_parameters())
                weight.register_hook(lambda gradient: gradient * float("nan"))
            return step(self, number)

        Trainer.step = poisoned

    argv = [*LONG, "--run-dir", str(run_dir), *TP2, "--async-save"]
    for rank in run(argv, tmp_path, size=2, prepare=fail_in_step_3):
        assert rank.code == 3 and "step 3: " in rank.err and "is not finite" in rank.err, rank
    assert folders.find(run_dir / "checkpoints").name == folders.folder_name(3)
    finished([*argv, "--resume"], tmp_path)
    assert metrics(run_dir) == metrics(whole(*TP2))


def test_a_tokenizer_that_cannot_be_copied_ends_all_ranks_before_any_work(whole, tmp_path):
    (tmp_path / "run" / ".tokenizer.model").mkdir(parents=True)
    argv = [*SMALL, *TP2, "--run-dir", str(tmp_path / "run"), "--load", str(whole(*TP2) / "checkpoints"), "--finetune"]
    for rank in run(argv, tmp_path, size=2):
        assert rank.code == 2 and "--run-dir" in rank.err and "tokenizer.model cannot be written: Is a dir" in rank.err


def test_a_run_that_was_killed_as_it_took_its_folder_begins(tmp_path):
    """Between the file that makes the folder its own and what is written into it."""
    run_dir = tmp_path / "run"

    def kill_it(rank: int) -> None:
        run_directory.write_synced = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)

    argv = [*SMALL, "--lr", "0.002", "--run-dir", str(run_dir)]
    assert run(argv, tmp_path, prepare=kill_it)[0].code == -signal.SIGKILL
    assert (run_dir / "config.toml").exists()
    (rank,) = run(argv, tmp_path)
    assert rank.code == 2 and "give --resume to go on with it" in rank.err
    finished([*argv, "--resume"], tmp_path, size=1)
    assert len(metrics(run_dir)) == 3 and "lr = 0.002" in (run_dir / "config.toml").read_text()


def test_metrics_that_were_lost_behind_a_checkpoint_are_told_and_leave_whole_lines(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole(*TP2), run_dir)
    forget(run_dir, 12)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:40])  # the checkpoint is of step 9
    out = finished([*LONG, "--run-dir", str(run_dir), *TP2, "--resume"], tmp_path)
    assert "metrics.jsonl lacks steps that it held when the checkpoint was written" in out
    assert [json.loads(line)["step"] for line in metrics(run_dir)] == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
    assert metrics(run_dir)[-3:] == metrics(whole(*TP2))[-3:]


def events_steps(run_dir: Path) -> list[int]:
    """Steps of the loss that TensorBoard shows: of a step that was done twice, the later one."""
    shown = EventAccumulator(str(run_dir / "tensorboard"))
    shown.Reload()
    return [event.step for event in shown.Scalars("loss")]


def test_tensorboard_has_every_step_of_a_run_that_was_killed_behind_a_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    argv = [*SMALL, "--train-iters", "8", "--save-interval", "3", "--run-dir", str(run_dir)]

    def kill_in_step_4(rank: int) -> None:
        step = Trainer.step

        def dying(self, number):
            if number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number)

        Trainer.step = dying

    assert run(argv, tmp_path, prepare=kill_in_step_4)[0].code == -signal.SIGKILL
    finished([*argv, "--resume"], tmp_path, size=1)
    assert events_steps(run_dir) == list(range(8))


def test_another_layout_takes_a_run_up_and_its_losses_agree(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole(*TP2), run_dir)
    forget(run_dir, 6, 9, 12)
    finished([*LONG, "--run-dir", str(run_dir), *PP2, *SHARDED, "--resume"], tmp_path)
    ours, theirs = ([json.loads(line) for line in metrics(path)] for path in (run_dir, whole(*TP2)))
    assert ours[:3] == theirs[:3] and len(ours) == 12
    for a, b in zip(ours[3:6], theirs[3:6], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["step"] == b["step"]
    assert "use_distributed_optimizer = true" in (run_dir / "config.toml").read_text()


def test_a_run_that_is_done_has_nothing_left_to_do_and_can_be_made_longer(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole(*TP2), run_dir)
    argv = [*LONG, "--run-dir", str(run_dir), *TP2, "--resume"]
    finished(argv, tmp_path)
    assert metrics(run_dir) == metrics(whole(*TP2))
    finished([*argv, "--train-iters", "13", "--keep-last", "2", "--keep-best", "log_p_mean"], tmp_path)
    assert metrics(run_dir)[:12] == metrics(whole(*TP2)) and len(metrics(run_dir)) == 13
    values = {int(s): json.loads(metrics(run_dir)[s - 1])["log_p_mean"] for s in (3, 6, 9, 12, 13)}
    kept = {folders.step_of(path) for path in (run_dir / "checkpoints").glob("iter_*")}
    assert kept == {12, 13, max(values, key=values.__getitem__)}


def test_a_run_is_not_taken_up_with_other_settings(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole(*TP2), run_dir)
    for rank in run([*LONG, "--run-dir", str(run_dir), *TP2, "--resume", "--q", "0.5"], tmp_path, size=2):
        assert rank.code == 2 and "--q was 0.75 and is 0.5" in rank.err
    for rank in run([*LONG, "--run-dir", str(run_dir), *TP2], tmp_path, size=2):
        assert rank.code == 2 and "give --resume to go on with it" in rank.err
    assert metrics(run_dir) == metrics(whole(*TP2))


def test_another_run_begins_from_a_checkpoint_whole_or_from_its_weights(whole, tmp_path):
    source = whole(*TP2) / "checkpoints"
    argv = [*SMALL, *TP2, "--train-iters", "14", "--load", str(source)]
    out = finished([*argv, "--run-dir", str(tmp_path / "on")], tmp_path)
    assert f"goes on from {source}/iter_0000012: 12 steps are done\n" in out
    assert [json.loads(line)["step"] for line in metrics(tmp_path / "on")] == [12, 13]
    out = finished([*argv, "--run-dir", str(tmp_path / "anew"), "--finetune", "--train-iters", "1"], tmp_path)
    assert f"begins with the weights of {source}/iter_0000012 (step 12)\n" in out
    [line] = [json.loads(line) for line in metrics(tmp_path / "anew")]
    first = json.loads(metrics(whole(*TP2))[0])
    assert line["step"] == 0 and line["log_p_mean"] > first["log_p_mean"] + 1  # what was learnt is still there
    tokenizers = {(path / "tokenizer.model").read_bytes() for path in (tmp_path / "anew", whole(*TP2))}
    assert len(tokenizers) == 1

    refused = {
        "--hidden-size 128": "hidden_size is 64 there and 128 here",
        "--train-examples 33": "was trained on other data",
        "--optimizer sgd": "was trained with --optimizer adam, not sgd",
    }
    for number, (flags, words) in enumerate(refused.items()):
        [rank, _] = run([*argv, "--run-dir", str(tmp_path / f"{number}"), *flags.split()], tmp_path, size=2)
        assert rank.code == 2 and words in rank.err, rank.err
