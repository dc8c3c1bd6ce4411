"""The alarm on an engine's ln p(z|x): what it compares, what rounding may explain, what it says and how often."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_jq.config import Config
from megatron_jq.objective.table import StepTable
from megatron_jq.records import Rollout
from megatron_jq.train.mismatch import MismatchWatch
from tests.distributed.ranks import run_ranks

TRAINER = torch.tensor([[-3.0, -4.0], [-5.0, float("nan")]], dtype=torch.float64)  # one slot was not trained on
PRESENT = ~TRAINER.isnan()


def drawn(gaps: list[float | None]) -> list[Rollout]:
    """Rollouts of 16 sampled tokens whose ln p lies so far above the trainer's."""
    known = TRAINER.flatten().nan_to_num(-1.0).tolist()
    return [
        Rollout(i // 2, i % 2, (9,) * 16 + (1,), 16, log_prob=None if gap is None else known[i] + gap)
        for i, gap in enumerate(gaps)
    ]


def _watch(runtime, steps, bf16: bool, top_p: float, alarm: float):
    """(what each step returns, what was said). steps: the gaps by step and replica."""
    config = Config()
    rollout = replace(config.rollout, top_p=top_p, score_mismatch_alarm=alarm)
    config, said = replace(config, rollout=rollout, model=replace(config.model, bf16=bf16)), []
    watch = MismatchWatch(config, runtime, said.append)
    dp = runtime.groups.dp
    results = []
    for step, gaps in enumerate(steps):
        share = drawn(gaps)[dp.rank() :: dp.size()]
        results.append(watch.log_prob(step, share, StepTable(None, PRESENT, TRAINER)))
    return results, said


def judged(*steps, bf16: bool = False, top_p: float = 1.0, alarm: float = 0.01, dp: int = 1):
    ranks = run_ranks(_watch, steps, bf16, top_p, alarm, dp=dp)
    assert all(results == ranks[0][0] and said == ranks[0][1] for results, said in ranks)
    return ranks[0]


def test_the_largest_gap_of_all_replicas_is_returned_and_what_was_not_trained_on_is_left_out():
    results, said = judged([0.001, -0.004, 0.002, 99.0], dp=2)
    assert results == [pytest.approx(0.004)] and said == []


def test_the_alarm_is_said_once_and_again_where_the_gap_has_doubled():
    results, said = judged([0.0, 0.5, 0, 0], [0.6, 0, 0, 0], [0, 0, 1.2, 0], [0, 0, 0, 0])
    assert results == pytest.approx([0.5, 0.6, 1.2, 0.0])
    assert [line.split(":")[1] for line in said] == [" step 0", " step 2"]
    assert "ln p(z|x) of engine and trainer differ by up to 0.5 nats, 0.49 above what rounding explains" in said[0]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 0.01), ({"alarm": 0.3}, 0.3), ({"bf16": True}, 0.2), ({"top_p": 0.9}, 0.01 - 2 * math.log(0.9))],
)
def test_what_rounding_explains_follows_the_precision_and_the_nucleus(settings, tolerance):
    assert judged([0.99 * tolerance, 0, 0, 0], **settings)[1] == []
    assert len(judged([1.01 * tolerance, 0, 0, 0], **settings)[1]) == 1


def test_an_unknown_ln_p_is_never_taken_for_zero_and_said_once():
    results, said = judged([None] * 4, [None] * 4)
    assert results == [None, None]
    [line] = said
    assert "step 0: the engine gives no ln p(z|x)" in line and "cannot be checked" in line
    results, said = judged([None, 0.004, 0, 0])
    assert results == [pytest.approx(0.004)] and len(said) == 1
