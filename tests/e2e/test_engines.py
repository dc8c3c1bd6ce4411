"""Engines that a newcomer adds, through the command line at TP 2. The first is that of docs/extending.md."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_jq.errors import UserError
from megatron_jq.rollout.engine import Capabilities
from megatron_jq.rollout.engines import ENGINES, EngineRow
from megatron_jq.train.run_directory import RunFolders
from tests.distributed.elsewhere import ELSEWHERE
from tests.e2e.launch import REPOSITORY, SMALL, run
from tests.e2e.test_training import assert_same_training, metrics

TP2 = ["--tensor-model-parallel-size", "2", "--no-tensorboard"]
WARNING = "ln p(z|x) of engine and trainer differ by up to"


def blocks() -> list[str]:
    """The section's Python: the class's file, and the row."""
    text = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    [engine] = [part for part in section if part.startswith("An engine\n")]
    return re.findall(r"```python\n(.*?)```", engine, flags=re.DOTALL)


@pytest.fixture
def uniform(tmp_path, monkeypatch):
    """Adds the documents' engine, its source changed by (old, new), its capabilities by keyword."""

    def add(*changes: tuple[str, str], **capabilities: bool) -> None:
        source, declared = blocks()
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / "uniform.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "uniform", raising=False)
        row = eval(declared, {"EngineRow": EngineRow, "Capabilities": Capabilities})
        assert row.build == "megatron_jq.rollout.uniform:UniformEngine"
        row = replace(row, build="uniform:UniformEngine", capabilities=replace(row.capabilities, **capabilities))
        monkeypatch.setitem(ENGINES, row.name, row)

    return add


def train(folder: Path, *flags: str, code: int = 0) -> list:
    ended = run([*SMALL, "--run-dir", str(folder / "run"), *TP2, *flags], folder, size=2)
    assert [rank.code for rank in ended] == [code, code], ended
    return ended


def test_an_engine_of_another_policy_runs_and_its_alarm_is_said(uniform, tmp_path):
    uniform()
    main, other = train(tmp_path, "--rollout-engine", "uniform", "--train-iters", "2")
    assert f"warning: step 0: {WARNING}" in main.out and "not drawn from the policy that is trained" in main.out
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2 and all(0.02 < line["log_prob_mismatch_max"] < 2 for line in lines), lines
    assert not other.out


def test_an_engine_that_lies_about_its_ln_p_is_caught(uniform, tmp_path):
    uniform(('log_prob=answer["log_prob"]', "log_prob=0.0"))
    main, _ = train(tmp_path, "--rollout-engine", "uniform", "--train-iters", "1")
    assert f"warning: step 0: {WARNING}" in main.out
    assert metrics(tmp_path / "run")[0]["log_prob_mismatch_max"] > 4


def test_an_engine_that_does_not_know_its_ln_p_is_said_once(uniform, tmp_path):
    uniform(('log_prob=answer["log_prob"]', "log_prob=None"), gives_log_prob=False)
    main, _ = train(tmp_path, "--rollout-engine", "uniform", "--train-iters", "2")
    assert main.out.count("gives no ln p(z|x)") == 1 and WARNING not in main.out
    assert [line["log_prob_mismatch_max"] for line in metrics(tmp_path / "run")] == [None, None]


#: What the newcomer forgot → the change, and what every rank says of it.
FORGOTTEN = {
    "the close token": ("answer[\"ids\"] + forced", 'answer["ids"]', "the rationale does not end with the close token"),
    "the weights": (
        "        for _ in named_weights():\n            pass", "        pass", "took 0 of the policy's",
    ),
    "the server's port": ("*self.server.server_address", '"127.0.0.1", 1', "ConnectionRefusedError"),
}  # fmt: skip


@pytest.mark.parametrize("part", FORGOTTEN)
def test_what_a_newcomer_forgets_stops_every_rank_with_its_name(part, uniform, tmp_path):
    old, new, words = FORGOTTEN[part]
    uniform((old, new))
    for rank in train(tmp_path, "--rollout-engine", "uniform", code=3):
        assert "rollout engine uniform" in rank.err and words in rank.err, rank.err


def test_a_step_without_enough_valid_rationales_stops_the_run(uniform, tmp_path):
    """GARL's baseline needs two of a prompt. With one of them, or none, every coefficient would be 0."""
    uniform(('log_prob=answer["log_prob"]', 'log_prob=answer["log_prob"], valid=m == 0'))
    for rank in train(tmp_path, "--rollout-engine", "uniform", code=3):
        assert "step 0: nothing to train on: 4 of 16 rationales are valid, and no prompt has the 2 that" in rank.err


def test_an_engine_is_closed_once_also_where_the_run_never_begins(uniform, tmp_path, monkeypatch):
    """It may have started a server."""
    uniform(("def close(self):\n", f"def close(self):\n        open({str(tmp_path / 'closed')!r}, 'a').write('x')\n"))
    train(tmp_path, "--rollout-engine", "uniform", "--train-iters", "1")
    assert (tmp_path / "closed").read_text() == "x"

    def refuse(self) -> None:
        raise UserError("the folder is taken")

    monkeypatch.setattr(RunFolders, "claim", refuse)
    for rank in train(tmp_path, "--rollout-engine", "uniform", "--run-dir", str(tmp_path / "other"), code=2):
        assert "the folder is taken" in rank.err
    assert (tmp_path / "closed").read_text() == "xx"


def test_an_engine_that_draws_elsewhere_from_the_policy_trains_as_the_one_in_the_process(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "elsewhere", ELSEWHERE)
    results = {}
    for name in ("megatron", "elsewhere"):
        (tmp_path / name).mkdir()
        main, _ = train(tmp_path / name, "--rollout-engine", name, "--score-with", "rollout")
        assert "warning" not in main.out, main.out
        results[name] = metrics(tmp_path / name / "run")
    assert_same_training(results["elsewhere"], results["megatron"])


def test_rounding_alone_raises_no_alarm(tmp_path):
    main, _ = train(tmp_path, "--bf16", "--top-p", "0.9", "--temperature", "0.7", "--rationale-budget", "32")
    assert "warning" not in main.out, main.out
    assert all(0 < line["log_prob_mismatch_max"] < 0.2 for line in metrics(tmp_path / "run"))
