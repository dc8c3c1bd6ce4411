"""`--reward MODULE:FUNCTION` and `--match math`, through the command line: the same on any layout, failures end all."""

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.launch import SMALL, run
from tests.e2e.test_grpo import PP2, TP2, metrics

MODULE = '''
import os

def graded(answer_ids, **_):
    """Another number for nearly every answer; and each call leaves a line."""
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{answer_ids}\\n")
    return sum(answer_ids) / 7

def even(answer_ids, **_):
    return sum(answer_ids) % 2 == 0

def late(answer_ids, **_):
    if os.environ["RANK"] == os.environ["FAULTY"]:
        raise ValueError("no such answer")
    return 1
'''


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "own.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


def train(folder: Path, name: str, *flags: str, size: int = 1, steps: int = 3):
    argv = [*SMALL, "--run-dir", str(folder / name), "--train-iters", str(steps), "--no-tensorboard", *flags]
    return run(argv, folder, size=size)


GRPO = ["--estimator", "grpo", "--reward", "own:graded"]


def test_the_reward_is_the_same_on_every_layout_and_asked_once_a_sample(folder):
    lines, calls = {}, {}
    for name, flags, size in (("one", [], 1), ("tp", TP2, 2), ("pp", PP2, 2), ("dp", [], 2)):
        (folder / "calls").write_text("")
        ended = train(folder, name, *GRPO, *flags, size=size)
        assert [rank.code for rank in ended] == [0] * size, ended
        lines[name], calls[name] = metrics(folder / name), sorted((folder / "calls").read_text().splitlines())
    for name in ("tp", "pp", "dp"):
        # the first step's weights are the same: so are its draws, to the last bit
        assert lines[name][0]["reward_mean"] == lines["one"][0]["reward_mean"]
        assert [line["reward_mean"] for line in lines[name]] == pytest.approx(
            [line["reward_mean"] for line in lines["one"]], rel=1e-6
        )
        assert calls[name] == calls["one"]
    assert lines["one"][0]["reward_mean"] > 1 and all(line["grad_norm"] > 0 for line in lines["one"])
    assert 'reward = "own:graded"' in (folder / "one" / "config.toml").read_text()


@pytest.mark.parametrize(("flags", "faulty"), [([], 1), (TP2, 0)], ids=["DP2", "TP2"])
def test_a_failure_of_one_replicas_call_ends_all_ranks_with_its_last_line(flags, faulty, folder, monkeypatch):
    monkeypatch.setenv("FAULTY", str(faulty))
    ended = train(folder, "run", "--estimator", "rloo", "--reward", "own:late", *flags, size=2)
    for rank in ended:
        assert rank.code == 3, ended
        assert "--reward own:late, prompt " in rank.err and "ValueError: no such answer (own.py:15)" in rank.err, rank


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--estimator grpo --reward nowhere:f",
            "--reward nowhere:f: the module cannot be imported (ModuleNotFoundError",
        ),
        ("--estimator star --reward own:graded", "it returned "),
        ("--reward own:even", "--reward is not read by this run: it needs --estimator grpo, rloo, maxrl or star, or"),
        ("--match reward", "--match reward needs --reward MODULE:FUNCTION"),
    ],
)
def test_what_cannot_be_used_is_refused(flags, message, folder):
    for rank in train(folder, "run", *flags.split(), size=2):
        assert rank.code == (3 if "returned" in message else 2) and message in rank.err, rank


def test_evaluation_reports_the_reward_judges_by_it_and_never_runs_it_unasked(folder):
    [end] = train(folder, "run", *GRPO, "--match", "exact")
    assert end.code == 0, end
    (folder / "calls").write_text("")
    load = ["evaluate", "--load", str(folder / "run" / "checkpoints"), "--eval-samples", "4", "--device", "cpu"]
    out = ["--output", str(folder / "plain")]
    [plain] = run([*load, *out, "--eval-temperature", "1"], folder)
    assert plain.code == 0 and "the run was trained with --reward own:graded, which is not run here" in plain.out, plain
    assert (folder / "calls").read_text() == ""
    out = ["--output", str(folder / "judged"), "--eval-temperature", "1"]
    [judged] = run([*load, *out, "--reward", "own:even", "--match", "reward"], folder)
    assert judged.code == 0, judged
    results = json.loads((folder / "judged" / "evaluation.json").read_text())
    assert results["evaluation"]["reward"] == "own:even" and results["judge"]["match"] == "reward"
    rates = {name: figure["value"] for name, figure in results["metrics"].items()}
    assert 0 < rates["pass@1"] == rates["reward"] < 1 and rates["pass@1"] < rates["pass@4"]
    # Judged again from the values in the file, without the function; by another judge too.
    file = str(folder / "judged" / "samples.jsonl")
    [again] = run(["evaluate", "--rescore", file, "--output", str(folder / "again")], folder)
    assert again.code == 0, again
    assert json.loads((folder / "again" / "evaluation.json").read_text())["metrics"] == results["metrics"]
    [math] = run(["evaluate", "--rescore", file, "--match", "math", "--answer-extract", "boxed"], folder)
    assert math.code == 0 and "math match" in math.out and "answer extracted by boxed" in math.out, math
    plain_file = str(folder / "plain" / "samples.jsonl")
    [none] = run(["evaluate", "--rescore", plain_file, "--match", "reward"], folder)
    assert none.code == 2, none
    [refused] = run(["evaluate", "--rescore", file, "--match", "math", "--match-rule", "text"], folder)
    assert refused.code == 2 and "--match-rule is not read by evaluate --rescore" in refused.err, refused
