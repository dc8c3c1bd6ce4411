"""q over training: shapes, exact end points, and what is refused."""

import math

import pytest

from megatron_jq.errors import UserError
from megatron_jq.objective.schedule import QSchedule, q_at


def test_constant_never_moves():
    schedule = QSchedule("constant", 0.75)
    assert {q_at(step, schedule) for step in (0, 1, 10_000)} == {0.75}
    assert q_at(10, QSchedule("constant", 0.75, None, 3)) == 0.75  # a run length does not matter to it


def test_step_is_sft_then_rlvr_and_switches_at_the_named_step():
    schedule = QSchedule("step", 1.0, 0.0, 5)
    assert [q_at(step, schedule) for step in range(8)] == [1.0] * 5 + [0.0] * 3


def test_linear_moves_by_equal_amounts():
    schedule = QSchedule("linear", 1.0, 0.0, 4)
    assert [q_at(step, schedule) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    rising = QSchedule("linear", 0.2, 0.8, 3)
    assert [q_at(step, rising) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_cosine_is_half_a_period_flat_at_both_ends():
    schedule = QSchedule("cosine", 1.0, 0.25, 8)
    expected = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert [q_at(step, schedule) for step in range(9)] == pytest.approx(expected)
    first, middle = q_at(0, schedule) - q_at(1, schedule), q_at(3, schedule) - q_at(4, schedule)
    assert 0.0 < first < middle / 3


@pytest.mark.parametrize("kind", ("step", "linear", "cosine"))
@pytest.mark.parametrize(("start", "end"), ((1.0, 0.0), (0.0, 1.0), (0.1, 0.7), (0.9, 0.9), (1.0, 1.0)))
def test_every_schedule_starts_and_ends_exactly_and_stays_between(kind, start, end):
    for num_steps in (1, 2, 7, 300):
        schedule = QSchedule(kind, start, end, num_steps)
        values = [q_at(step, schedule) for step in range(num_steps + 5)]
        assert values[0] == start and set(values[num_steps:]) == {end} and q_at(-3, schedule) == start
        assert all(min(start, end) <= value <= max(start, end) for value in values)
        assert values == sorted(values, reverse=start > end)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("exponential", 1.0, 0.0, 3), "constant, step, linear, cosine"),
        (("constant", 1.5), "0, 1"),
        (("linear", 1.0, -0.1, 3), "0, 1"),
        (("linear", 1.0, 0.0, 0), "at least 1"),
        (("step", 1.0, 0.0), "number of steps"),
        (("cosine", 1.0, None, 3), "end value"),
        (("constant", 1.0, 0.0, 3), "constant q schedule has no end value"),
    ),
)
def test_a_schedule_that_makes_no_sense_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(UserError, match=message):
        QSchedule(*arguments)
