"""Packing sequences into one row: what each place predicts, which positions it has, and what is left out."""

import random

import pytest
import torch

from megatron_jq.model.rows import pack_sequences
from megatron_jq.records import TrainingSequence

CPU = torch.device("cpu")


def sequences(seed: int = 0, count: int = 7) -> list[TrainingSequence]:
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(1, 1000) for _ in range(rng.randint(low, high)))

    result = []
    for b in range(count):
        rationale = ids(1, 6)
        result.append(TrainingSequence(b, 0, ids(1, 5), rationale, rng.randint(0, len(rationale)), ids(0, 4)))
    return result


def scored_by_hand(sequences: list[TrainingSequence], *, with_rationale: bool) -> list[tuple[int, int, int, int]]:
    """(sequence, index of the token in it, token, column) of every token that must be scored."""
    expected = []
    for n, s in enumerate(sequences):
        everything = list(s.prompt_ids) + list(s.rationale_ids) + list(s.answer_ids)
        for index, token in enumerate(everything):
            in_rationale = len(s.prompt_ids) <= index < len(s.prompt_ids) + s.num_sampled
            in_answer = index >= len(s.prompt_ids) + len(s.rationale_ids)
            if in_answer or (in_rationale and with_rationale):
                expected.append((n, index, token, 1 if in_answer else 0))
    return expected


@pytest.mark.parametrize("with_rationale", [False, True])
@pytest.mark.parametrize(("sequence_multiple", "row_multiple"), [(1, 1), (4, 1), (1, 4), (8, 3)])
def test_exactly_the_sampled_and_answer_tokens_are_scored_each_by_the_place_before_it(
    with_rationale, sequence_multiple, row_multiple
):
    batch = sequences()
    rows = pack_sequences(
        batch, device=CPU, with_rationale=with_rationale, sequence_multiple=sequence_multiple, row_multiple=row_multiple
    )
    starts, place = [], 0
    for s in batch:
        starts.append(place)
        assert tuple(rows.token_T[place : place + len(s)].tolist()) == s.prompt_ids + s.rationale_ids + s.answer_ids
        padded = -(-len(s) // sequence_multiple) * sequence_multiple
        assert rows.position_T[place : place + padded].tolist() == list(range(padded))
        place += padded
    scored = set()
    head = rows.head
    for position, target, cell in zip(
        head.position_N.tolist(), head.target_N.tolist(), head.cell_N.tolist(), strict=True
    ):
        n, column = divmod(cell, 2)
        scored.add((n, position + 1 - starts[n], target, column))
    expected = scored_by_hand(batch, with_rationale=with_rationale)
    assert scored == set(expected) and len(head.cell_N) == len(expected)
    assert head.num_sequences == len(batch)
    assert len(rows.token_T) % row_multiple == 0 and len(rows.token_T) - place < row_multiple
    assert sum(rows.attention.lengths) == len(rows.token_T)


def test_no_sequences_give_a_row_of_padding_that_scores_nothing():
    for row_multiple in (1, 2, 8):
        rows = pack_sequences([], device=CPU, with_rationale=True, row_multiple=row_multiple)
        assert len(rows.token_T) == row_multiple and rows.head.num_sequences == 0 and len(rows.head.cell_N) == 0


@pytest.mark.parametrize("answers_too", [False, True])
def test_temperature_and_nucleus_hold_for_what_was_sampled_alone(answers_too):
    rows = pack_sequences(
        sequences(), device=CPU, with_rationale=True, temperature=0.5, top_p=0.75, tempered_answers=answers_too
    )
    head = rows.head
    for cell, inverse, top_p in zip(
        head.cell_N.tolist(), head.inverse_temperature_N.tolist(), head.top_p_N.tolist(), strict=True
    ):
        sampled = cell % 2 == 0 or answers_too
        assert (inverse, top_p) == ((2.0, 0.75) if sampled else (1.0, 1.0))


def test_scored_answers_were_not_sampled_and_carry_no_temperature_and_no_nucleus():
    """A nucleus of no token would be sought by 32 passes over the vocabulary for every one."""
    head = pack_sequences(sequences(), device=CPU, with_rationale=False, temperature=0.5, top_p=0.75).head
    assert head.inverse_temperature_N is None and head.top_p_N is None
    head = pack_sequences(
        sequences(), device=CPU, with_rationale=False, temperature=0.5, top_p=0.75, tempered_answers=True
    ).head
    assert set(head.top_p_N.tolist()) == {0.75}


def test_the_plain_distribution_carries_no_temperature_and_no_nucleus():
    head = pack_sequences(sequences(), device=CPU, with_rationale=True).head
    assert head.inverse_temperature_N is None and head.top_p_N is None


def test_a_token_carries_its_sequences_coefficient_for_its_column():
    batch = sequences()
    pairs = [(0.5 + n, -10.0 * n) for n in range(len(batch))]
    head = pack_sequences(batch, device=CPU, with_rationale=True, coefficients=pairs).head
    assert head.coefficient_N.dtype == torch.float64
    for cell, coefficient in zip(head.cell_N.tolist(), head.coefficient_N.tolist(), strict=True):
        assert coefficient == pairs[cell // 2][cell % 2]
    assert pack_sequences(batch, device=CPU, with_rationale=True).head.coefficient_N is None


def test_a_scored_token_without_one_before_it_is_refused():
    with pytest.raises(AssertionError, match="prompts are never empty"):
        pack_sequences([TrainingSequence(0, 0, (), (5, 6), 2, (7,))], device=CPU, with_rationale=True)
