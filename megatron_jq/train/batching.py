"""F4: which replica trains which sequence, and in which micro-batch. No result depends on either; time and memory do.

Sequences are plain token ids, so moving them between replicas costs four bytes a token.
"""

import torch
import torch.distributed as dist

from megatron_jq.parallel.collectives import all_gather_flat
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Sequence


def cost(sequence: Sequence, hidden_size: int) -> float:
    """Work of one sequence of length L relative to a token's matrix products: L + L² / (6·H).

    A layer's products take about 24·H² operations a token (SwiGLU of width 3·H), its causal attention 2·L·H: a ratio of
    L / (12·H), and twice that where the backward pass makes the scores again, as flash kernels do.
    """
    return len(sequence) + len(sequence) ** 2 / (6 * hidden_size)


def balance(sequences: list[Sequence], hidden_size: int, runtime: Runtime) -> list[Sequence]:
    """Share all replicas' sequences out anew, evenly by cost; returns this replica's part, in slot order.

    Greedy, longest first to the least loaded replica: at most 4/3 of the best possible makespan (Graham 1969). Every
    rank computes the same shares. Cost: two all-gathers over the data-parallel group, of 4 bytes a token in all.
    """
    dp = runtime.groups.dp
    if dp.size() == 1:
        return sequences
    everyones = [s for part in _all_gather(sequences, runtime) for s in part]
    order = sorted(everyones, key=lambda s: (-cost(s, hidden_size), s.prompt_slot, s.rationale_slot))
    load, mine = [0.0] * dp.size(), []
    for sequence in order:
        replica = min(range(dp.size()), key=load.__getitem__)
        load[replica] += cost(sequence, hidden_size)
        if replica == dp.rank():
            mine.append(sequence)
    return sorted(mine, key=lambda s: (s.prompt_slot, s.rationale_slot))


def micro_batches(
    sequences: list[Sequence], *, micro_batch_size: int, max_tokens: int | None, sequence_multiple: int = 1
) -> list[list[Sequence]]:
    """Cut a replica's sequences into micro-batches; never none: an idle replica gets an empty one.

    By count, micro_batch_size at a time, in the order given; or, with max_tokens, first-fit decreasing into rows of at
    most that many tokens (at most 11/9 of the fewest possible, plus one). A sequence longer than max_tokens gets a row
    of its own: the caller refuses such settings before work starts.
    """
    if max_tokens is None:
        return [sequences[i : i + micro_batch_size] for i in range(0, len(sequences), micro_batch_size)] or [[]]
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: (-len(s), s.prompt_slot, s.rationale_slot)):
        length = -(-len(sequence) // sequence_multiple) * sequence_multiple
        row = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(sequence)
        room[row] -= length
    return rows or [[]]


def in_step_with_expert_peers(batches: list[list[Sequence]], runtime: Runtime) -> list[list[Sequence]]:
    """Append empty micro-batches until every replica that shares experts with this one has equally many.

    A layer's tokens travel between those replicas in every pass. Cost: one all-reduce of a number, where they share.
    """
    peers = runtime.groups.expert_peers
    if peers is None:
        return batches
    most = torch.tensor(len(batches), device=runtime.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=peers)
    return batches + [[] for _ in range(most.item() - len(batches))]


def _all_gather(sequences: list[Sequence], runtime: Runtime) -> list[list[Sequence]]:
    """Every replica's sequences, as int32 numbers: six of a head each, then the ids."""
    numbers: list[int] = []
    for s in sequences:
        ids = (s.prompt_ids, s.rationale_ids, s.answer_ids)
        numbers.extend((s.prompt_slot, s.rationale_slot, s.num_sampled, *map(len, ids)))
        numbers.extend(token for part in ids for token in part)
    dp, device = runtime.groups.dp, runtime.device
    counts = torch.empty(dp.size(), dtype=torch.int64, device=device)
    all_gather_flat(counts, torch.tensor([len(numbers)], device=device), dp)
    longest = int(counts.max())
    padded = torch.zeros(longest, dtype=torch.int32, device=device)
    padded[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32, device=device)
    everyones = torch.empty(dp.size() * longest, dtype=torch.int32, device=device)
    all_gather_flat(everyones, padded, dp)
    parts = everyones.view(dp.size(), longest).tolist()
    return [_decode(part[:count]) for part, count in zip(parts, counts.tolist(), strict=True)]


def _decode(numbers: list[int]) -> list[Sequence]:
    sequences, at = [], 0
    while at < len(numbers):
        prompt_slot, rationale_slot, num_sampled, *lengths = numbers[at : at + 6]
        at += 6
        parts = []
        for length in lengths:
            parts.append(tuple(numbers[at : at + length]))
            at += length
        sequences.append(Sequence(prompt_slot, rationale_slot, parts[0], parts[1], num_sampled, parts[2]))
    return sequences
