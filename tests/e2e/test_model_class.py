"""A run crosses the classes of --model-class and back, and is the run on one class alone: metrics and checkpoints.

What this does not exercise: Transformer Engine's layers, which need CUDA.
"""

import filecmp
import importlib.util
from pathlib import Path

import pytest

from tests.e2e.launch import SMALL, run
from tests.e2e.test_resume import metrics

HAS_HYBRID = importlib.util.find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is not None
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
EXPERTS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-query-groups 2 --kv-channels 16 --num-experts 4 "
    "--moe-ffn-hidden-size 24 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --expert-model-parallel-size 2"
).split()
LAYOUTS = {
    "TP2 with SP": [*TP2, "--sequence-parallel"],
    "PP2, bf16": [*PP2, "--bf16"],
    "DP2 x EP2, distributed optimizer": [*EXPERTS, "--use-distributed-optimizer"],
}
NOTE = "gives GPTModel, which the policy is built on, critical fixes only"


def finished(argv: list[str], folder: Path) -> list[str]:
    """Run on two ranks to the end; what each wrote."""
    ended = run(argv, folder, size=2)
    assert [rank.code for rank in ended] == [0, 0], ended
    return [rank.out + rank.err for rank in ended]


def train(run_dir: Path, steps: int, flags: list[str], *more: str) -> list[str]:
    argv = [*SMALL, "--run-dir", str(run_dir), *flags, "--train-iters", str(steps), "--no-tensorboard", *more]
    argv += ["--eval-interval", "1"]  # so that no part of a run evaluates at an end of its own
    return finished(argv, run_dir.parent)


@pytest.mark.skipif(not HAS_HYBRID, reason="this Megatron-core has no HybridModel for it (0.19 has)")
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_run_crosses_to_the_other_class_and_back(flags, tmp_path):
    alone, crossing = tmp_path / "alone", tmp_path / "crossing"
    written = train(alone, 3, flags)
    assert [output.count(NOTE) for output in written] == [1, 0]
    for steps, kind in ((1, "hybrid"), (2, "gpt"), (3, "hybrid")):
        written = train(crossing, steps, flags, "--resume", "--model-class", kind)
        assert [output.count(NOTE) for output in written] == [1 if kind == "gpt" else 0, 0]
    assert metrics(crossing) == metrics(alone)
    assert len(metrics(alone)) == 3
    last, other = (run_dir / "checkpoints" / "iter_0000003" for run_dir in (alone, crossing))
    tensors = [path.name for path in last.glob("*.distcp")]
    assert len(tensors) > 1
    assert filecmp.cmpfiles(last, other, tensors, shallow=False)[0] == tensors


@pytest.mark.skipif(not HAS_HYBRID, reason="this Megatron-core has no HybridModel for it (0.19 has)")
def test_either_class_evaluates_the_other_s_checkpoint(tmp_path):
    train(tmp_path / "run", 1, TP2, "--model-class", "hybrid")
    results = []
    for kind in ("gpt", "hybrid"):
        output = tmp_path / kind
        argv = ["evaluate", "--load", str(tmp_path / "run" / "checkpoints"), "--output", str(output), "--device", "cpu"]
        finished([*argv, *PP2, "--model-class", kind, "--eval-samples", "2"], tmp_path)
        results.append((output / "samples.jsonl").read_text(encoding="utf-8"))
    assert results[0].count("\n") > 1
    assert results[0] == results[1]


@pytest.mark.skipif(HAS_HYBRID, reason="this Megatron-core has HybridModel")
def test_an_older_megatron_core_is_refused_on_every_rank(tmp_path):
    for ended in run([*SMALL, "--run-dir", str(tmp_path / "run"), *TP2, "--model-class", "hybrid"], tmp_path, size=2):
        assert ended.code == 2
        assert "--model-class hybrid needs Megatron-core 0.19 or later" in ended.err
        assert not (tmp_path / "run").exists()
