"""Which sequences of steps are reported as a fall of ln P: a broken policy is, a batch of other prompts is not."""

import random

import pytest

from megatron_jq.train.falls import STEPS, FallWatch

#: (ln P, answer tokens) of a step: one-letter and long answers of an untrained policy, and the latter learnt.
EASY, HARD, LEARNT = (-11.21, 2), (-293.597, 52), (-0.6, 52)
BROKEN, DEEPER, DESTROYED = (-5_000.0, 52), (-30_000.0, 52), (-5_348_145.0, 12)


def reports(steps, watch=None):
    """[(step, destroyed)] of the falls that are reported."""
    watch, falls = watch or FallWatch(), []
    for step, (log_p, tokens) in enumerate(steps):
        if (fall := watch.judge(log_p / tokens)) is not None:
            falls.append((step, fall.destroyed))
    return falls


@pytest.mark.parametrize(
    ("steps", "falls"),
    [
        ([EASY, HARD, HARD, EASY], []),  # the run that was warned in error
        ([EASY, HARD] * 40, []),
        ([EASY] * 100 + [HARD], []),
        ([LEARNT] * 40 + [HARD, EASY], []),
        ([(-8_000.0, 8), (-7_000.0, 8)], []),  # it began there
        ([EASY, HARD] * 5 + [BROKEN] * 5, [(10, False)]),
        ([EASY, HARD] * 5 + [DESTROYED], [(10, True)]),
        ([HARD] * 100 + [LEARNT] * STEPS + [(-3_000.0, 52)], [(100 + STEPS, False)]),  # judged by what it has learnt
        ([EASY, BROKEN, DEEPER, DESTROYED], [(1, False), (3, True)]),
        # one that came back silences none after it: a deeper one, one that stays, one that destroys
        ([EASY, BROKEN, EASY, HARD, DEEPER, HARD], [(1, False), (4, False)]),
        ([EASY, BROKEN, EASY, HARD, BROKEN, BROKEN, BROKEN], [(1, False), (5, False)]),
        ([EASY, BROKEN, EASY, DESTROYED], [(1, False), (3, True)]),
        ([EASY, BROKEN] * 20, [(1, False)]),  # prompts that are as hard as that
    ],
)
def test_a_fall_is_one_that_no_difference_between_prompts_explains(steps, falls):
    assert reports(steps) == falls


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_of_prompts_is_a_fall_and_a_broken_policy_is_one_in_each(seed):
    draw = random.Random(seed)
    rates = [draw.uniform(-12, 0) for _ in range(4)]  # nats per token of four kinds of prompts
    steps = []
    for _ in range(200):
        tokens = draw.choice([1, 2, 50, 4_000])
        steps.append((draw.choice(rates) * tokens, tokens))
    assert reports(steps) == []
    tokens = draw.choice([1, 50, 4_000])
    assert reports([*steps, (-200.0 * tokens, tokens)]) == [(200, False)]
    assert reports([*steps, (-2_000.0 * tokens, tokens)]) == [(200, True)]


def test_a_resumed_run_compares_with_the_steps_before_it():
    before = FallWatch()
    assert reports([EASY, HARD] * 30, before) == [] and len(before.recent) == STEPS
    assert reports([BROKEN], FallWatch(before.recent)) == [(0, False)]
    assert reports([BROKEN]) == []
    fall = FallWatch(before.recent).judge(-100.0)
    assert str(fall) == f"-100 per answer token, from -5.646, the lowest of the last {STEPS} steps"
