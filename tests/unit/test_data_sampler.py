"""The sampler: epochs are whole permutations, and a batch is a function of its step alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.data.sampler import PromptSampler
from megatron_jq.errors import UserError


@given(st.integers(1, 40), st.data())
def test_every_epoch_holds_every_example_once_even_where_a_batch_spans_two(num_examples, data):
    batch_size = data.draw(st.integers(1, num_examples))
    sampler = PromptSampler(num_examples, batch_size, seed=data.draw(st.integers(-5, 5)))
    epochs = 3
    steps = -(-epochs * num_examples // batch_size)
    drawn = [position for step in range(steps) for position in sampler.batch(step)]
    for epoch in range(epochs):
        assert sorted(drawn[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_a_resumed_run_sees_the_batches_it_would_have_seen():
    before = [PromptSampler(50, 16, seed=9).batch(step) for step in range(12)]
    resumed = PromptSampler(50, 16, seed=9)
    assert [resumed.batch(step) for step in range(7, 12)] == before[7:]
    assert [resumed.batch(step) for step in (3, 11, 0)] == [before[3], before[11], before[0]]


def test_order_depends_on_the_seed_and_on_the_epoch():
    one, other = PromptSampler(64, 64, seed=1), PromptSampler(64, 64, seed=2)
    assert one.batch(0) != other.batch(0)
    assert one.batch(0) != one.batch(1)
    assert one.batch(0) != list(range(64))


def test_the_order_of_a_seed_is_this_on_every_machine_and_python():
    assert PromptSampler(8, 8, seed=1234).batch(0) == [5, 2, 4, 7, 1, 6, 3, 0]


def test_epochs_are_counted_from_the_first_prompt_of_a_step():
    sampler = PromptSampler(10, 4, seed=0)
    assert [sampler.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


def test_more_prompts_a_step_than_examples_are_refused():
    assert len(PromptSampler(16, 16, seed=0).batch(0)) == 16
    with pytest.raises(UserError, match="--prompts-per-step 17 is more than the 16 training examples; use at most 16"):
        PromptSampler(16, 17, seed=0)
    with pytest.raises(UserError, match="--prompts-per-step 0 is below 1"):
        PromptSampler(16, 0, seed=0)


def test_a_step_below_zero_is_refused():
    with pytest.raises(ValueError, match="steps count from 0"):
        PromptSampler(4, 2, seed=0).batch(-1)
