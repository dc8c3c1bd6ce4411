"""Training on a set of reasoning-gym: ranks agree, it brings a validation split, and a resumed run finds its items."""

import importlib.util
import json

import pytest

from tests.e2e.launch import SMALL, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed: pip install 'megatron-jq[reasoning-gym]'",
)
SOURCE = "reasoning-gym:gcd:size=40"


def test_two_ranks_train_resume_and_refuse_other_items(tmp_path):
    config = tmp_path / "small.toml"
    lines = (line for line in open(SMALL[2]) if not line.startswith("train_examples"))
    config.write_text("".join(lines))
    argv = ["train", "--config", str(config), "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    argv += ["--tokenizer-vocab-size", "320", "--tensor-model-parallel-size", "2"]
    ended = run([*argv, "--train-data", SOURCE, "--train-iters", "2"], tmp_path, size=2)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "40 training and 4 of 128 held-out examples" in ended[0].out
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*2/checkpoint.json")
    assert "reasoning-gym" in json.loads(checkpoint.read_text())["versions"]

    ended = run([*argv, "--train-data", SOURCE, "--train-iters", "3", "--resume"], tmp_path, size=2)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3

    for checkpoint in (tmp_path / "run" / "checkpoints").glob("*/checkpoint.json"):
        manifest = json.loads(checkpoint.read_text())
        manifest["versions"]["reasoning-gym"] = "0.0.1"
        checkpoint.write_text(json.dumps(manifest))
    ended = run([*argv, "--train-data", f"{SOURCE},seed=1", "--train-iters", "4", "--resume"], tmp_path, size=2)
    assert [rank.code for rank in ended] == [2, 2], ended
    assert "was trained on other data than --train-data gives now" in ended[0].err
    assert "reasoning-gym was 0.0.1, and" in ended[0].err
