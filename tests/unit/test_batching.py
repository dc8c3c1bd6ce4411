"""Micro-batches hold every sequence once, within the budget; the cut is even by cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.model.rows import pack_sequences, sharing_pays
from megatron_jq.records import TrainingSequence
from megatron_jq.train.batching import Unit, _decode, micro_batches, trained_tokens, units

CPU = torch.device("cpu")


def branch(prompt: int, slot: int, length: int, prompt_tokens: int) -> TrainingSequence:
    return TrainingSequence(prompt, slot, (1,) * prompt_tokens, (2,) * length, length, (3, 4))


def sequence(slot: int, length: int) -> TrainingSequence:
    return TrainingSequence(slot, 0, (1,) * length, (2,), 1, (3, 4))


lengths = st.lists(st.integers(1, 40), max_size=30)


@given(lengths, st.integers(50, 200), st.sampled_from([1, 4]))
def test_budgeted_rows_hold_every_sequence_once_within_the_budget(lengths, budget, multiple):
    sequences = [sequence(slot, length) for slot, length in enumerate(lengths)]
    rows = micro_batches(sequences, micro_batch_size=1, max_tokens=budget, sequence_multiple=multiple)
    padded = [sum(-(-len(s) // multiple) * multiple for s in row) for row in rows]
    assert sorted(s.prompt_slot for row in rows for s in row) == list(range(len(sequences)))
    assert max(padded, default=0) <= budget
    # First-fit decreasing leaves at most one row less than half full.
    assert sum(tokens <= budget / 2 for tokens in padded) <= 1


@given(lengths, st.integers(1, 9))
def test_cut_by_count_keeps_the_order(lengths, size):
    sequences = [sequence(slot, length) for slot, length in enumerate(lengths)]
    rows = micro_batches(sequences, micro_batch_size=size, max_tokens=None)
    assert [s for row in rows for s in row] == sequences
    assert all(len(row) == size for row in rows[:-1]) and len(rows[-1]) <= size


def test_no_sequences_make_one_empty_micro_batch():
    assert micro_batches([], micro_batch_size=3, max_tokens=None) == [[]]
    assert micro_batches([], micro_batch_size=3, max_tokens=10) == [[]]


def test_a_sequence_above_the_budget_gets_a_row_of_its_own():
    rows = micro_batches([sequence(0, 30), sequence(1, 1)], micro_batch_size=1, max_tokens=20)
    assert sorted(len(row) for row in rows) == [1, 1]


def test_cost_grows_from_linear_to_quadratic():
    short, long = (Unit((sequence(0, length),)).cost(1000) for length in (7, 59_997))
    assert short == 10 + 100 / 6000
    assert long == 60_000 + 60_000**2 / 6000


def test_sequences_survive_the_exchange_between_replicas():
    sequences = [TrainingSequence(3, 1, (5, 6), (), 0, (7,)), TrainingSequence(0, 2, (), (8, 9, 1), 2, ())]
    numbers = []
    for s in sequences:
        ids = (s.prompt_ids, s.rationale_ids, s.answer_ids)
        numbers += [s.prompt_slot, s.rationale_slot, s.num_sampled, *map(len, ids), *ids[0], *ids[1], *ids[2]]
    assert _decode(numbers) == sequences


prompts = st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 20), min_size=1, max_size=8)), max_size=6)


@given(prompts, st.integers(90, 200), st.sampled_from([1, 4]))
def test_budgeted_rows_of_shared_prompts_hold_every_branch_once_within_the_budget(prompts, budget, multiple):
    sequences = [
        branch(b, m, length, prompt) for b, (prompt, lengths) in enumerate(prompts) for m, length in enumerate(lengths)
    ]
    rows = micro_batches(
        sequences, micro_batch_size=1, max_tokens=budget, sequence_multiple=multiple, share_prompts=True
    )
    found = [(s.prompt_slot, s.rationale_slot) for row in rows for s in row]
    assert sorted(found) == sorted((s.prompt_slot, s.rationale_slot) for s in sequences)
    for row in rows:
        assert sum(unit.tokens for unit in units(row, share_prompts=True, multiple=multiple)) <= budget
        slots = [s.prompt_slot for s in row]
        assert [a for a, b in zip(slots, slots[1:], strict=False) if a != b].count(slots[0] if slots else 0) <= 1
    alone = micro_batches(sequences, micro_batch_size=1, max_tokens=budget, sequence_multiple=multiple)
    assert len(rows) <= len(alone)


def test_a_shared_prompt_costs_its_tokens_once_and_its_branches_keys_each_time():
    shared = Unit(tuple(branch(0, m, 8, 100) for m in range(4)))
    assert shared.tokens == 100 + 4 * 10
    assert shared.cost(1000) == 140 + (100**2 / 2 + 100 * 40 + 4 * 10**2 / 2) / 3000
    assert [len(piece.sequences) for piece in shared.pieces(3)] == [2, 2]
    assert Unit((branch(0, 0, 8, 100),)).tokens == 110


@given(st.integers(1, 80), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 4, 64]))
def test_a_group_is_shared_exactly_where_that_takes_fewer_tokens(prompt, lengths, multiple):
    group = [branch(0, m, length, prompt) for m, length in enumerate(lengths)]

    def tokens(share_prompts):
        rows = pack_sequences(
            group, device=CPU, with_rationale=True, sequence_multiple=multiple, share_prompts=share_prompts
        )
        return len(rows.token_T)

    plain = sum(-(-len(s) // multiple) * multiple for s in group)
    tree = prompt + sum(-(-(len(s) - prompt) // multiple) * multiple for s in group)
    assert tokens(False) == plain
    assert tokens(True) == Unit(tuple(group), multiple).tokens == (min(tree, plain) if len(group) > 1 else plain)


def test_short_prompts_before_padded_branches_are_not_shared():
    short, long = ([branch(0, m, 4, prompt) for m in range(16)] for prompt in (50, 100))
    assert not sharing_pays(short, 64) and sharing_pays(short, 1)
    assert sharing_pays(long, 64)
    assert Unit(tuple(short), 64).cost(1000) == pytest.approx(sum(Unit((s,), 64).cost(1000) for s in short))


@pytest.mark.parametrize("share_prompts", [True, False])
def test_trained_tokens_count_a_shared_prompt_once_however_its_rationales_are_spread(share_prompts):
    """B = 3, M = 4, the last rationales of the second prompt and all of the third left out."""
    lengths = {(b, m): (5 + 10 * b, 3 + m) for b in range(3) for m in range(4)}
    sequences = [TrainingSequence(b, m, (1,) * p, (2,) * z, z, (3, 4)) for (b, m), (p, z) in lengths.items()]
    present = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    branches = sum(z + 2 for (b, m), (_, z) in lengths.items() if present[b, m])
    prompts = 5 + 15 if share_prompts else 4 * 5 + 2 * 15
    for size in (1, 2, 3, 5):
        replicas = [sequences[rank::size] for rank in range(size)]
        counted = sum(trained_tokens(part, present, share_prompts=share_prompts) for part in replicas)
        assert counted == prompts + branches
