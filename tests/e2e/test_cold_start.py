"""A start at ln P near -75, where P^(1-q) and Adam's squares of it lie below float32: what a run says, and what it
learns with --loss-scale. Twelve-token answers and a tiny policy: a step takes a twentieth of a second.
"""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_jq.checkpoint.folder import find, read_manifest
from tests.e2e.launch import run
from tests.e2e.test_resume import metrics as compared

STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    draw, words = random.Random(0), [f"w{n:02d}" for n in range(60)]
    rows = [{"prompt": f"say {word}", "answer": " ".join(draw.choices(words, k=4))} for word in words[:16]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = [{**row, "answer": " ".join(draw.choices(words, k=150))} for row in rows]
    (folder / "frozen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    return folder


def flags(folder: Path, name: str, *more: str, data: str = "train", steps: int = STEPS) -> list[str]:
    small = "--model tiny --num-layers 1 --hidden-size 64 --ffn-hidden-size 128 --rationale-budget 3 --lr 2e-3"
    size = "--prompts-per-step 8 --num-rationales 4 --sample-interval 0 --no-tensorboard --device cpu"
    return [
        "train", *small.split(), *size.split(), "--tokenizer-vocab-size", "280", "--train-iters", str(steps),
        "--train-data", f"{folder}/{data}.jsonl", "--run-dir", f"{folder}/{name}", *more,
    ]  # fmt: skip


def trained(folder: Path, name: str, *more: str, size: int = 1, **options) -> tuple[list[dict], str]:
    """The metrics of a run that ended well, and what it said."""
    ended = run(flags(folder, name, *more, **options), folder, size=size)
    assert [end.code for end in ended] == [0] * size, ended
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], ended[0].out


@pytest.mark.parametrize("q", ["0.25", "0.5"])
def test_small_q_stays_with_a_warning_and_leaves_with_a_loss_scale(folder, q):
    stays, said = trained(folder, f"stays-{q}", "--q", q)
    assert stays[0]["log_p_mean"] < -65 and stays[-1]["log_p_mean"] < stays[0]["log_p_mean"] + 2
    assert 0 < stays[0]["grad_norm"] < 1e-14  # not 0, as float32's sum of squares has it
    [warning] = [line for line in said.splitlines() if line.startswith("warning")]  # once
    assert "below --adam-eps 1e-08" in warning and "--loss-scale auto" in warning and f"q = {q}" in warning
    leaves, said = trained(folder, f"leaves-{q}", "--q", q, "--loss-scale", "auto")
    assert leaves[-1]["log_p_mean"] > leaves[0]["log_p_mean"] + 10
    assert "step 0: the loss scale is 2^" in said and "warning" not in said
    for key in ("loss", "log_p_mean", "effective_reward_max"):
        assert leaves[0][key] == stays[0][key]
    assert leaves[0]["grad_norm"] == pytest.approx(stays[0]["grad_norm"], rel=1e-3)  # without the scale


def test_auto_is_the_constant_factor_and_leaves_a_start_beyond_float32(folder):
    auto, _ = trained(folder, "auto", "--q", "0.25", "--loss-scale", "auto")
    scale = read_manifest(find(folder / "auto" / "checkpoints")).optimizer["loss_scale"]
    constant, _ = trained(folder, "constant", "--q", "0.25", "--loss-scale", f"{scale:.0f}")
    assert [line["grad_norm"] for line in constant] == [line["grad_norm"] for line in auto]
    longer = ("--q", "0.75", "--max-position-embeddings", "1024")
    hidden, said = trained(folder, "hidden", *longer, data="frozen", steps=2)
    assert hidden[0]["log_p_mean"] < -2000 and hidden[0]["grad_norm"] == 0
    assert "coefficients reach below float32's smallest number" in said and "is 0, exactly 0, where coeff" in said
    seen, said = trained(folder, "seen", *longer, "--loss-scale", "auto", data="frozen", steps=6)
    assert 0 < seen[0]["grad_norm"] < 1e-200 and seen[-1]["log_p_mean"] > seen[0]["log_p_mean"] + 100
    assert "warning" not in said and said.count("the loss scale is 2^") >= 2  # lowered as coefficients grew


def test_a_resumed_run_keeps_its_scale_bit_for_bit(folder):
    more = ["--q", "0.5", "--loss-scale", "auto", "--save-interval", "6"]
    trained(folder, "whole", *more)
    trained(folder, "half", *more, steps=6)
    trained(folder, "half", *more, "--resume")
    assert compared(folder / "half") == compared(folder / "whole")
    scales = [read_manifest(find(folder / name / "checkpoints")).optimizer for name in ("half", "whole")]
    assert scales[0] == scales[1] and scales[0]["loss_scale"] > 1
    [ended] = run([*flags(folder, "half", "--q", "0.5", "--loss-scale", "2"), "--resume"], folder)
    assert ended.code == 2 and "--loss-scale" in ended.err


def test_easy_and_hard_prompts_by_turns_are_no_fall_and_the_warning_names_the_ways_out(folder):
    rows = [json.dumps({"prompt": f"say {n}", "answer": "a" if n % 2 else "w17 w03 " * 7}) + "\n" for n in range(6)]
    (folder / "mixed.jsonl").write_text("".join(rows))
    sizes = ("--prompts-per-step", "1", "--q", "0.25", "--lr", "1e-4", "--loss-scale", "auto")
    lines, said = trained(folder, "mixed", *sizes, data="mixed", steps=6)
    log_p = [line["log_p_mean"] for line in lines]
    assert min(log_p) < -220 and max(log_p) > -20 and "ln P fell" not in said
    assert any(before > -20 and after < -220 for before, after in pairwise(log_p)), log_p  # or nothing was tested
    [hidden] = [line for line in said.splitlines() if "exactly 0" in line]
    assert "--finetune" in hidden and "larger --q" in hidden and "--prompts-per-step" in hidden
    (folder / "hard.jsonl").write_text("".join(rows[::2]))  # the way out that it names: on these alone
    more = ("--prompts-per-step", "3", "--q", "0.25", "--loss-scale", "auto", "--finetune")
    alone, _ = trained(folder, "hard", *more, "--load", f"{folder}/mixed/checkpoints", data="hard", steps=8)
    assert alone[0]["log_p_mean"] < -220 and alone[-1]["log_p_mean"] > alone[0]["log_p_mean"] + 20


@pytest.mark.parametrize(
    ("name", "layout"),
    [("tp2", ["--tensor-model-parallel-size", "2"]), ("dp2", ["--use-distributed-optimizer"]), ("bf16", ["--bf16"])],
)
def test_every_layout_leaves_alike(folder, name, layout):
    size = 1 if name == "bf16" else 2
    lines, said = trained(folder, name, "--q", "0.25", "--loss-scale", "auto", *layout, size=size)
    alone, _ = trained(folder, f"alone-{name}", "--q", "0.25", "--loss-scale", "auto")
    assert "the loss scale is 2^" in said and "warning" not in said
    rough = {"rel": 0.2} if name == "bf16" else {"rel": 1e-3}
    assert lines[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=rough["rel"] * 5)
    assert lines[-1]["log_p_mean"] == pytest.approx(alone[-1]["log_p_mean"], abs=4 if name == "bf16" else 1)


def test_an_epsilon_below_the_floor_ends_the_run_before_it_destroys_the_weights(folder):
    ended = run([*flags(folder, "floor", "--q", "0.25", "--adam-eps", "1e-30"), "--use-distributed-optimizer"], folder)
    assert [end.code for end in ended] == [3], ended
    assert "a weight would move" in ended[0].err and "--loss-scale auto" in ended[0].err
    assert "Traceback" not in ended[0].err
