"""The command line where folders are shared, damaged or resumed otherwise: what the rules of unit/test_run_folders.py,
test_branches.py and test_resume_rules.py come to when a model trains.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_jq.checkpoint import folder as folders
from tests.e2e.launch import SMALL, Ranks, run

SHORT = [*SMALL, "--no-tensorboard", "--save-interval", "1", "--save-interval-minutes", "0"]


def one(argv: list[str], folder: Path):
    [ended] = run(argv, folder)
    return ended


def files(folder: Path) -> dict[str, str]:
    """Every file but the lock, with its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]


def test_runs_and_sweep_points_with_one_save_cannot_touch_each_others_checkpoints(tmp_path):
    save = tmp_path / "save"
    argv = [*SHORT, "--save", str(save), "--keep-last", "1"]
    a, b = ["--run-dir", str(tmp_path / "a")], ["--run-dir", str(tmp_path / "b"), "--q", "0.5"]
    assert one([*argv, *a, "--resume"], tmp_path).code == 0
    before = files(save)
    for flags in (
        [*b, "--resume"],
        b,
        [*b, "--load", str(save), "--train-iters", "5"],
        ["--run-dir", str(tmp_path / "c")],
    ):
        refused = one([*argv, *flags], tmp_path)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1, refused
        assert f"--save {save} belongs to run" in refused.err and f"in {tmp_path}/a (step 3)" in refused.err
        assert files(save) == before and not (tmp_path / "b" / "config.toml").exists()
    assert one([*argv, *a, "--resume", "--train-iters", "4"], tmp_path).code == 0
    assert steps(tmp_path / "a") == [0, 1, 2, 3] and set(folders.saved_steps(save)) == {4}


def test_two_starts_at_once_in_one_save_and_two_resumes_of_one_run_have_one_winner(tmp_path):
    both, out = [], [tmp_path / name for name in "ab"]
    for folder in out:
        folder.mkdir()
        argv = [*SHORT, "--train-iters", "12", "--run-dir", str(folder / "run"), "--save", str(tmp_path / "save")]
        both.append(Ranks(argv, folder))
    ended = [ranks.ended()[0] for ranks in both]
    assert sorted(end.code for end in ended) == [0, 2], ended
    winner = out[[end.code for end in ended].index(0)]
    assert "--save" in "".join(end.err for end in ended) and steps(winner / "run") == list(range(12))

    argv = [*SHORT, "--run-dir", str(winner / "run"), "--save", str(tmp_path / "save"), "--resume", "--train-iters"]
    first = Ranks([*argv, "40"], out[0])
    first.wait_for_steps(winner / "run", 14)
    second = one([*argv, "40"], out[1])
    assert second.code == 2 and f"--run-dir {winner}/run is in use by process" in second.err
    assert first.ended()[0].code == 0 and steps(winner / "run") == list(range(40))


def test_after_damage_and_after_a_step_back_the_new_saves_stay(tmp_path):
    run_dir = tmp_path / "run"
    save = run_dir / "checkpoints"
    argv = [*SHORT, "--run-dir", str(run_dir), "--resume"]
    assert one([*argv, "--train-iters", "7", "--save-interval", "2"], tmp_path).code == 0  # 2, 4, 6, 7
    for step in (6, 7):
        shard = save / folders.folder_name(step) / "__0_0.distcp"
        os.truncate(shard, 1000)
    again = one([*argv, "--train-iters", "6", "--save-interval", "1", "--keep-last", "2"], tmp_path)
    assert (
        again.code == 0
        and "iter_0000007 is damaged" in again.out
        and "not taken up: the checkpoints of steps 6, 7" in again.out
    )
    assert set(folders.saved_steps(save)) == {5, 6} and steps(run_dir) == list(range(6))
    assert one([*argv, "--train-iters", "9", "--save-interval", "1"], tmp_path).code == 0  # 5 to 9
    (save / folders.TRACKER).write_text("6\n")
    back = one([*argv, "--train-iters", "7", "--keep-last", "2"], tmp_path)
    assert back.code == 0 and "of steps 7, 8, 9, which this run does not continue" in back.out
    assert set(folders.saved_steps(save)) == {6, 7} and steps(run_dir) == list(range(7))
    (save / folders.TRACKER).write_text("latest\n")
    refused = one([*argv, "--train-iters", "8"], tmp_path)
    assert refused.code == 2 and "says 'latest', which is no checkpoint's step (there are 6, 7)" in refused.err


@pytest.fixture
def trained_on_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {n} and {n}", "answer": str(2 * n)} for n in range(12)]
    for name, part in (("train", rows[:8]), ("eval", rows[8:10]), ("more", rows[8:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    argv = [
        *SHORT, "--run-dir", "run", "--eval-data", "eval.jsonl", "--estimator", "paft", "--q-final", "0",
        "--q-schedule", "linear", "--lr-decay-style", "cosine", "--tokenizer-vocab-size", "290",
    ]  # fmt: skip
    assert one([*argv, "--train-data", "train.jsonl"], tmp_path).code == 0
    return argv


def test_a_schedule_is_kept_or_refused_and_what_is_equal_may_be_named_otherwise(trained_on_files, tmp_path):
    argv, run_dir = [*trained_on_files, "--resume", "--train-iters", "5"], Path("run")
    before = (run_dir / "metrics.jsonl").read_text()
    refused = one([*argv, "--train-data", "train.jsonl"], tmp_path)
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "give --lr-decay-iters 3 to keep it" in refused.err and "give --q-schedule-iters 2 to keep it" in refused.err
    kept = [*argv, "--lr-decay-iters", "3", "--q-schedule-iters", "2"]
    Path("other.jsonl").write_text(Path("more.jsonl").read_text() * 3)
    other = one([*kept, "--train-data", "other.jsonl"], tmp_path)
    assert other.code == 2 and "other data" in other.err
    assert "--train-data was train.jsonl and is other.jsonl" in other.err
    assert (run_dir / "metrics.jsonl").read_text() == before
    ended = one(
        [*kept, "--train-data", f"{tmp_path}/train.jsonl", "--eval-data", "more.jsonl", "--match", "substring"],
        tmp_path,
    )
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert [line["q"] for line in lines] == [0.75, 0.375, 0.0, 0.0, 0.0]
    assert [line["lr"] for line in lines[3:]] == [0.0, 0.0] and (run_dir / "metrics.jsonl").read_text().startswith(
        before
    )
