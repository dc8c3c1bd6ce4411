"""Random streams: no two of any seed, step and purpose coincide, and those of ordinary runs stay what they were."""

import itertools

import numpy as np
import pytest
import torch

from megatron_jq.config import parse_args
from megatron_jq.config_validate import validate
from megatron_jq.data.sampler import PromptSampler
from megatron_jq.errors import UserError
from megatron_jq.seeds import EVALUATION_SEED_OFFSET, evaluation_seed, rollout_seed, short_seed, stream

#: Seeds that arithmetic with shifts, sums or 32 bits would take for one another.
SEEDS = [
    0, 1, 2, 1234, 4096, 4097, 1234 + 4096, 1 << 20, (1 << 20) + 1, 1 << 32, (1 << 32) + 1, (1 << 32) + 1234, 1 << 40,
    (1 << 40) + 1, (1 << 63) - 1, EVALUATION_SEED_OFFSET, EVALUATION_SEED_OFFSET + 1, EVALUATION_SEED_OFFSET + 1234,
    (1 << 32) + EVALUATION_SEED_OFFSET, (1 << 32) - EVALUATION_SEED_OFFSET,
]  # fmt: skip
STEPS = [0, 1, 2, 4095, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]


def paft_draws(seed: int, step: int) -> tuple[float, ...]:
    """How often each of 64 equal rationales is drawn by the estimator itself."""
    from megatron_jq.objective.table import StepTable
    from megatron_jq.train.estimators import Estimator

    paft = Estimator("paft", 512, True, seed)
    table = torch.full((1, 64), -3.0, dtype=torch.float64)
    return tuple(paft.coefficients(StepTable(table, table < 0), q=0.5, step=step).answer_BM[0].tolist())


def rollout_draws(seed: int, step: int) -> tuple[float, ...]:
    from megatron_jq.rollout.sampling import UniformStream

    return tuple(UniformStream(rollout_seed(seed), step, 0, 0).at(n) for n in range(4))


def evaluation_draws(seed: int, step: int) -> tuple[float, ...]:
    from megatron_jq.rollout.sampling import UniformStream

    return tuple(UniformStream(evaluation_seed(seed), step, 0, 0).at(n) for n in range(4))


@pytest.mark.parametrize("draws", [(paft_draws,), (rollout_draws, evaluation_draws)], ids=["PAFT", "samples"])
def test_streams_of_other_seeds_steps_and_purposes_do_not_coincide(draws):
    keys = list(itertools.product(draws, SEEDS, STEPS))
    seen = {}
    for draw, seed, step in keys:
        key = draw(seed, step)
        assert key not in seen, ((draw.__name__, seed, step), seen[key])
        seen[key] = (draw.__name__, seed, step)
    assert len(seen) == len(keys)


def test_streams_take_any_integers_and_keep_their_parts_apart():
    keys = list(itertools.product(("a", "b", "a 1"), (-(1 << 70), -1, 0, 1, 11, 1 << 70), (-1, 0, 1, 11)))
    first = [tuple(stream(purpose, *key).random(3)) for purpose, *key in keys]
    assert len(set(first)) == len(keys)
    assert np.array_equal(stream("a", 1, 2).random(5), stream("a", 1, 2).random(5))


def test_ordinary_runs_sample_as_they_did():
    """Rollouts and evaluations of seeds below 1,000,003 are those of every earlier version."""
    assert [rollout_seed(seed) for seed in (0, 1234, EVALUATION_SEED_OFFSET - 1)] == [0, 1234, 1_000_002]
    assert evaluation_seed(1234) == 1_001_237 and short_seed(1234) == 1234


def test_seeds_that_need_more_than_32_bits_give_orders_and_intervals_of_their_own():
    orders = {tuple(PromptSampler(64, 64, seed).batch(0)) for seed in SEEDS}
    assert len(orders) == len(SEEDS)
    short = {short_seed(seed) for seed in SEEDS}
    assert len(short) == len(SEEDS) and all(0 <= seed < 1 << 32 for seed in short)
    from megatron_jq.objective.metrics import bootstrap_interval

    values = torch.arange(100, dtype=torch.float64).sqrt()
    intervals = {bootstrap_interval(values, resamples=50, seed=seed) for seed in (7, 7 + (1 << 32), 7 + (1 << 40))}
    assert len(intervals) == 3


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_outside_the_range_are_refused_by_name(seed):
    with pytest.raises(UserError, match="--seed must be"):
        validate(parse_args([f"--seed={seed}"]), 1)
