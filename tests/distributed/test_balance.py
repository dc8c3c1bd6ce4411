"""Sharing the step's sequences out anew loses none and evens the replicas' work."""

import random

from megatron_jq.records import TrainingSequence
from megatron_jq.train.batching import Unit, balance, units
from tests.distributed.ranks import run_ranks

HIDDEN = 64


def _sequences() -> list[TrainingSequence]:
    rng = random.Random(4)

    def ids(low, high):
        return tuple(rng.randrange(50) for _ in range(rng.randint(low, high)))

    return [TrainingSequence(b, m, ids(1, 60), ids(1, 200), 1, ids(0, 5)) for b in range(6) for m in range(5)]


def _shared(runtime, lopsided: bool):
    rank, size = runtime.groups.dp.rank(), runtime.groups.dp.size()
    mine = (_sequences() if rank == 0 else []) if lopsided else _sequences()[rank::size]
    return balance(mine, HIDDEN, runtime)


def test_replicas_get_every_sequence_once_and_equal_work():
    for lopsided in (False, True):
        parts = run_ranks(_shared, lopsided, dp=3)
        everything = sorted((s for part in parts for s in part), key=lambda s: (s.prompt_slot, s.rationale_slot))
        assert everything == _sequences()
        work = [sum(Unit((s,)).cost(HIDDEN) for s in part) for part in parts]
        assert max(work) <= 4 / 3 * sum(work) / 3
        assert max(work) / min(work) < 1.1


def test_tensor_parallel_peers_agree_on_their_share():
    parts = run_ranks(_shared, False, tp=2, dp=2)
    assert parts[0] == parts[1] and parts[2] == parts[3]


def _trees() -> list[TrainingSequence]:
    rng = random.Random(5)
    prompts = [tuple(rng.randrange(50) for _ in range(rng.randint(20, 60))) for _ in range(8)]
    return [
        TrainingSequence(b, m, prompt, tuple(range(rng.randint(1, 20))), 1, (7,))
        for b, prompt in enumerate(prompts)
        for m in range(12 if b else 100)
    ]


def _shared_trees(runtime):
    rank, size = runtime.groups.dp.rank(), runtime.groups.dp.size()
    return balance(_trees()[rank::size], HIDDEN, runtime, share_prompts=True)


def test_prompts_stay_together_unless_they_are_more_than_a_fair_share():
    parts = run_ranks(_shared_trees, dp=3)
    order = lambda s: (s.prompt_slot, s.rationale_slot)  # noqa: E731
    assert sorted((s for part in parts for s in part), key=order) == sorted(_trees(), key=order)
    homes = [{rank for rank, part in enumerate(parts) for s in part if s.prompt_slot == b} for b in range(8)]
    assert len(homes[0]) > 1 and all(len(home) == 1 for home in homes[1:])
    work = [sum(unit.cost(HIDDEN) for unit in units(part, share_prompts=True)) for part in parts]
    assert max(work) / min(work) < 1.25
