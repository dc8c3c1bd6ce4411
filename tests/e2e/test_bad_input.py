"""Bad input through the whole command line: exit code 2, the fault named on every rank, nothing else, no training."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.e2e.launch import SMALL, Ended, finish, run, start_processes, start_torchrun, worker_codes

GOOD = {"prompt": "two and two", "answer": "four"}
LONG = {"prompt": "two and two " * 60, "answer": "four"}
TOO_LONG = r"exceed 20 prompt tokens and \d+ answer tokens: data\.jsonl:2 \(\d+ prompt tokens\)"
OVERLONG_ARGV = ["--tokenizer-vocab-size", "280", "--max-prompt-tokens", "20", "--prompts-per-step", "2"]


def lines(*records) -> str:
    return "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)


# Name → (flags, message as a pattern, content of data.jsonl, which --train-data names where there is content)
CASES = {
    "unknown flag": (["--num-rationale", "3"], "unknown flag --num-rationale; did you mean --num-rationales", ""),
    "unknown TOML key": (["--config", "run.toml"], "run.toml: unknown key clip_gard; did you mean clip_grad", ""),
    "q above 1": (["--q", "1.5"], "--q must lie between 0 and 1, not 1.5", ""),
    "q below 0": (["--q", "-0.25"], "--q must lie between 0 and 1, not -0.25", ""),
    "one rationale": (["--num-rationales", "1"], "--num-rationales must be at least 2 for --estimator garl", ""),
    "one rationale, RLOO": (["--num-rationales", "1", "--estimator", "rloo"], "at least 2 for --estimator rloo", ""),
    "rationale budget": (["--rationale-budget", "0"], "--rationale-budget must be at least 1, not 0", ""),
    "answer budget": (["--answer-budget", "0"], "--answer-budget must be at least 1, not 0", ""),
    "prompt budget": (["--max-prompt-tokens", "0"], "--max-prompt-tokens must be at least 1, not 0", ""),
    "data file missing": (["--train-data", "nowhere.jsonl"], "--train-data nowhere.jsonl: No such file", ""),
    "eval file missing": (["--eval-data", "nowhere.jsonl"], "--eval-data nowhere.jsonl: No such file", ""),
    "malformed line": ([], "data.jsonl:3: not JSON at column 12", lines(GOOD, GOOD, '{"prompt": ')),
    "missing field": ([], "data.jsonl:2: no field 'answer'", lines(GOOD, {"prompt": "two"})),
    "empty answer": ([], "data.jsonl:2: field 'answer' is empty", lines(GOOD, {"prompt": "two", "answer": " "})),
    "empty answer, GSM8K": ([], "data.jsonl:1: nothing follows '####'", lines({"question": "a", "answer": "b ####"})),
    "too few examples": (["--prompts-per-step", "33"], "--prompts-per-step 33 is more than the 32 training", ""),
    "overlong": (OVERLONG_ARGV, f"2 of 3 examples {TOO_LONG}, data.jsonl:3", lines(GOOD, LONG, LONG)),
    "all overlong": ([*OVERLONG_ARGV, "--overlong-prompts", "drop"], "1 of 1 examples exceed 20", lines(LONG)),
    "tokenizer missing": (["--tokenizer-model", "no.model"], "--tokenizer-model no.model: No such file", ""),
    "tokenizer folder missing": (
        ["--tokenizer-model", "no", "--tokenizer-type", "huggingface"],
        "--tokenizer-model no/tokenizer.json: No such file",
        "",
    ),
    "not a tokenizer": (["--tokenizer-model", "run.toml"], "--tokenizer-model run.toml is not a sentencepiece", ""),
    "no CUDA": (["--device", "cuda"], "--device cuda: this process sees no CUDA device", ""),
    "run folder below a file": (["--run-dir", "run.toml/run"], "run.toml/run cannot be written: Not a dir", ""),
    "run folder below a device": (["--run-dir", "/dev/null/x"], "/dev/null/x cannot be written: Not a dir", ""),
    "run folder refused": (["--run-dir", "/sys/x"], "--run-dir /sys/x cannot be written: ", ""),
    "run folder not writable": (["--run-dir", "/sys"], "--run-dir /sys cannot be written: ", ""),
    "run folder's name too long": (["--run-dir", "x" * 300], "cannot be written: File name too long", ""),
}


def assert_refused(ended: list[Ended], pattern: str) -> None:
    """Every rank ended with 2, and with the message alone."""
    for rank, end in enumerate(ended):
        prefix = f"[rank {rank}] " if len(ended) > 1 else ""
        assert end.code == 2, f"{prefix}{end}"
        assert [line for line in end.err.splitlines() if not line.startswith(f"{prefix}megatron-jq: error: ")] == []
        assert re.search(pattern, end.err), end.err


def without_cuda(rank: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_refused_on_every_rank_before_work_starts(name, size, tmp_path, monkeypatch):
    flags, message, data = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[optimizer]\nclip_gard = 1.0\n")
    if data:
        Path("data.jsonl").write_text(data)
        flags = ["--train-data", "data.jsonl", *flags]
    small = SMALL if "--config" not in flags else ["train", "--device", "cpu"]
    argv = [*small, "--run-dir", "run", "--tensor-model-parallel-size", str(size), *flags]
    assert_refused(run(argv, tmp_path, size=size, prepare=without_cuda), message)
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("config.toml"))


# What stands in the way (a folder, or with "=" a file) → (flags, message as a pattern)
BLOCKED = {
    "run/tensorboard=": ([], "--run-dir run/tensorboard cannot be written: File exists"),
    "run/metrics.jsonl": (["--resume"], "--run-dir run/metrics.jsonl cannot be written: Is a directory"),
    "run/config.toml": (["--resume"], "--resume: cannot read run/config.toml: Is a directory"),
    "run/tokenizer.model": ([], "cannot write run/tokenizer.model: Is a directory"),
    "run/.config.toml": ([], "--run-dir run cannot be written: Is a directory"),
    "run/checkpoints=": ([], "--save run/checkpoints cannot be written: File exists"),
}


@pytest.mark.parametrize("path", BLOCKED)
def test_what_rank_0_cannot_write_ends_every_rank_with_its_name(path, tmp_path, monkeypatch):
    flags, message = BLOCKED[path]
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path(path).mkdir() if not path.endswith("=") else Path(path.removesuffix("=")).write_text("")
    argv = [*SMALL, "--run-dir", "run", "--tensor-model-parallel-size", "2", *flags]
    assert_refused(run(argv, tmp_path, size=2), message)
    assert not Path("run/config.toml").is_file() and not Path("run/metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "size", "message"),
    [
        ("--tensor-model-parallel-size 2", 3, r"3 process\(es\) cannot be cut into .* of 2 x 1 = 2"),
        ("--tensor-model-parallel-size 2", 1, r"1 process\(es\) cannot be cut into .* of 2 x 1 = 2"),
        ("--pipeline-model-parallel-size 2 --num-layers 3", 2, r"2 does not divide num_layers \(3\)"),
        ("--tensor-model-parallel-size 2 --num-query-groups 1", 2, r"2 does not divide num_query_groups \(1\)"),
        (
            "--tensor-model-parallel-size 2 --num-attention-heads 3 --num-query-groups 3",
            2,
            r"2 does not divide num_attention_heads \(3\)",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(flags, size, message, tmp_path):
    run_dir = tmp_path / "run"
    assert_refused(run([*SMALL, "--run-dir", str(run_dir), *flags.split()], tmp_path, size=size), message)
    assert not run_dir.exists()


@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize(
    ("flag", "file"), [("--train-data", "data.jsonl"), ("--eval-data", "data.jsonl"), ("--tokenizer-model", "my.model")]
)
def test_a_file_that_one_rank_lacks_stops_all_ranks_with_its_message(lacking, flag, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    Path("data.jsonl").write_text(lines(GOOD))
    Path("my.model").write_text("not read: the other rank has no file")

    def move_away(rank: int) -> None:
        if rank == lacking:
            os.chdir("elsewhere")

    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), "--prompts-per-step", "1"]
    if flag != "--tokenizer-model":
        argv += ["--tokenizer-vocab-size", "270"]
    ended = run([*argv, flag, file], tmp_path, size=2, prepare=move_away)
    assert_refused(ended, f"{flag} {file}")
    assert len({end.err.partition("error: ")[2] for end in ended}) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_overlong_prompts_are_dropped_and_counted_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(lines(GOOD, LONG, GOOD, LONG, GOOD))
    argv = [*SMALL, "--run-dir", "run", "--train-data", "data.jsonl", "--train-iters", "1", *OVERLONG_ARGV]
    (ended,) = run([*argv, "--overlong-prompts", "drop"], tmp_path)
    assert ended.code == 0, ended.err
    assert "3 training and 0 held-out examples, 2 overlong examples dropped" in ended.out
    assert "warning: --train-data data.jsonl: 2 overlong examples left out: data.jsonl:2 (" in ended.out


@pytest.mark.parametrize("size", [1, 2])
def test_a_refused_run_leaves_its_folder_free_and_a_run_that_was_keeps_it(size, tmp_path):
    run_dir = tmp_path / "run"
    argv = [*SMALL, "--run-dir", str(run_dir), "--train-iters", "1"]
    assert_refused(run([*argv, "--train-data", "nowhere"], tmp_path, size=size), "nowhere")
    assert [end.code for end in run(argv, tmp_path, size=size)] == [0] * size

    def times() -> dict[str, int]:  # who looks at a folder holds its lock meanwhile
        return {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir() if path.name != ".lock"}

    before = times()
    assert_refused(run(argv, tmp_path, size=size), f"--run-dir {run_dir} holds another run")
    assert times() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeed", "1"], "unknown flag --seeed; did you mean --seed"),
        (["--train-data", "nowhere.jsonl"], "--train-data nowhere.jsonl: No such file"),
    ],
)
def test_a_process_of_its_own_ends_with_the_message_and_code_2(flags, message, tmp_path):
    (process,) = start_processes([*SMALL, "--run-dir", str(tmp_path / "run"), *flags], 1)
    assert_refused([finish(process)], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--q", "2"], "--q must lie between 0 and 1, not 2.0"),
        (["--run-dir", "/dev/null/x"], "--run-dir /dev/null/x cannot be written"),
    ],
)
def test_under_torchrun_every_rank_tells_and_workers_end_with_2(flags, message, tmp_path):
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), "--tensor-model-parallel-size", "2", *flags]
    ended = finish(start_torchrun(argv, 2))
    assert ended.code == 1
    codes = worker_codes(ended)
    # torchrun ends the ranks that are still there (-15) a moment after it saw the first failure.
    assert 2 in codes.values() and set(codes.values()) <= {2, -15}, codes
    for rank in codes:
        if codes[rank] == 2:
            assert f"[rank {rank}] megatron-jq: error: {message}" in ended.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
