"""F4: which replica trains which sequence, and in which micro-batch. No result depends on either; time and memory do.

Sequences are plain token ids, so moving them between replicas costs four bytes a token.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_jq.model.rows import padded, sharing_pays
from megatron_jq.parallel.collectives import all_gather_flat
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import TrainingSequence


def trained_tokens(sequences: Iterable[TrainingSequence], present_BM: torch.Tensor, *, share_prompts: bool) -> int:
    """Tokens of this replica's sequences that were trained on, without padding; over all replicas the step's.

    present_BM: which slots of the whole step were, alike on every rank. share_prompts: a prompt counts once for all its
    rationales, with the first of them; so the sum does not depend on how they lie in micro-batches and replicas.
    """
    first_B = present_BM.int().argmax(dim=1).tolist()
    total = 0
    for s in sequences:
        if present_BM[s.prompt_slot, s.rationale_slot]:
            with_prompt = not share_prompts or s.rationale_slot == first_B[s.prompt_slot]
            total += len(s) if with_prompt else len(s) - len(s.prompt_ids)
    return total


@dataclass(frozen=True)
class Unit:
    """What is moved and packed as one: the sequences of one prompt, or one sequence.

    Several share the prompt in a row, where that pays (rows.py).
    """

    sequences: tuple[TrainingSequence, ...]  # in slot order
    multiple: int = 1  # to which a sequence, or a branch, is padded

    @property
    def tokens(self) -> int:
        """In a row."""
        if not sharing_pays(self.sequences, self.multiple):
            return sum(padded(len(s), self.multiple) for s in self.sequences)
        prompt = len(self.sequences[0].prompt_ids)
        return prompt + sum(padded(len(s) - prompt, self.multiple) for s in self.sequences)

    def cost(self, hidden_size: int) -> float:
        """Work relative to a token's matrix products: tokens + pairs / (3·H), pairs of a query and a key.

        A layer's products take about 24·H² operations a token (SwiGLU of width 3·H), its attention 4·H a pair: a ratio
        of 1 / (6·H), and twice that where the backward pass makes the scores again, as flash kernels do.
        """
        if not sharing_pays(self.sequences, self.multiple):
            return sum(len(s) + len(s) ** 2 / (6 * hidden_size) for s in self.sequences)
        prompt = len(self.sequences[0].prompt_ids)
        branches = [len(s) - prompt for s in self.sequences]
        pairs = prompt**2 / 2 + prompt * sum(branches) + sum(n**2 for n in branches) / 2
        return prompt + sum(branches) + pairs / (3 * hidden_size)

    @property
    def slot(self) -> tuple[int, int]:
        return self.sequences[0].prompt_slot, self.sequences[0].rationale_slot

    def pieces(self, count: int) -> list["Unit"]:
        """Cut into at most `count` units of even numbers of sequences, which repeat the prompt."""
        size = -(-len(self.sequences) // max(count, 1))
        parts = [self.sequences[i : i + size] for i in range(0, len(self.sequences), size)]
        return [Unit(part, self.multiple) for part in parts]


def units(sequences: list[TrainingSequence], *, share_prompts: bool, multiple: int = 1) -> list[Unit]:
    """Sequences in slot order as units."""
    ordered = sorted(sequences, key=_slot)
    if not share_prompts:
        return [Unit((s,), multiple) for s in ordered]
    return [Unit(tuple(group), multiple) for _, group in itertools.groupby(ordered, key=lambda s: s.prompt)]


def _slot(sequence: TrainingSequence) -> tuple[int, int]:
    return sequence.prompt_slot, sequence.rationale_slot


def balance(
    sequences: list[TrainingSequence], hidden_size: int, runtime: Runtime, *, share_prompts: bool = False
) -> list[TrainingSequence]:
    """Share all replicas' sequences out again, evenly by cost; returns this replica's part, in slot order.

    Greedy, longest first to the least loaded replica: at most 4/3 of the best possible makespan (Graham 1969) over what
    is moved as one; a prompt's sequences are, unless they are more than a replica's fair share. Every
    rank computes the same shares. Cost: two all-gathers over the data-parallel group, of 4 bytes a token in all.
    """
    dp = runtime.groups.dp
    if dp.size() == 1:
        return sequences
    all_units = units([s for part in _all_gather(sequences, runtime) for s in part], share_prompts=share_prompts)
    fair = sum(unit.cost(hidden_size) for unit in all_units) / dp.size()
    moved = [part for unit in all_units for part in unit.pieces(math.ceil(unit.cost(hidden_size) / max(fair, 1.0)))]
    load, share = [0.0] * dp.size(), []
    for unit in sorted(moved, key=lambda u: (-u.cost(hidden_size), u.slot)):
        replica = min(range(dp.size()), key=load.__getitem__)
        load[replica] += unit.cost(hidden_size)
        if replica == dp.rank():
            share.extend(unit.sequences)
    return sorted(share, key=_slot)


def micro_batches(
    sequences: list[TrainingSequence],
    *,
    micro_batch_size: int,
    max_tokens: int | None,
    sequence_multiple: int = 1,
    share_prompts: bool = False,
) -> list[list[TrainingSequence]]:
    """Cut a replica's sequences into micro-batches; never none: an idle replica gets an empty one.

    By count, micro_batch_size at a time, in the order given; or, with max_tokens, first-fit decreasing into rows of at
    most that many tokens (at most 11/9 of the fewest possible, plus one). A prompt's sequences that are too many for a
    row become several units that repeat the prompt. A sequence longer than max_tokens gets a row of its own: the caller
    refuses such settings before work starts.
    """
    if max_tokens is None:
        return [sequences[i : i + micro_batch_size] for i in range(0, len(sequences), micro_batch_size)] or [[]]
    rows: list[list[TrainingSequence]] = []
    room: list[int] = []
    all_units = units(sequences, share_prompts=share_prompts, multiple=sequence_multiple)
    fitting = [piece for unit in all_units for piece in _within(unit, max_tokens)]
    for unit in sorted(fitting, key=lambda u: (-u.tokens, u.slot)):
        row = next((i for i, free in enumerate(room) if free >= unit.tokens), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].extend(unit.sequences)
        room[row] -= unit.tokens
    return rows or [[]]


def _within(unit: Unit, max_tokens: int) -> list[Unit]:
    """The unit as few units of at most max_tokens each; one sequence is never cut."""
    parts: list[Unit] = []
    for sequence in unit.sequences:
        longer = Unit((*parts[-1].sequences, sequence), unit.multiple) if parts else None
        if longer is not None and longer.tokens <= max_tokens:
            parts[-1] = longer
        else:
            parts.append(Unit((sequence,), unit.multiple))
    return parts


def in_step_with_expert_peers(batches: list[list[TrainingSequence]], runtime: Runtime) -> list[list[TrainingSequence]]:
    """Append empty micro-batches until every replica that shares experts with this one has equally many.

    A layer's tokens travel between those replicas in every pass. Cost: one all-reduce of a number, where they share.
    """
    peers = runtime.groups.expert_peers
    if peers is None:
        return batches
    most = torch.tensor(len(batches), device=runtime.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=peers)
    return batches + [[] for _ in range(int(most) - len(batches))]


def _all_gather(sequences: list[TrainingSequence], runtime: Runtime) -> list[list[TrainingSequence]]:
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
    message = torch.zeros(longest, dtype=torch.int32, device=device)
    message[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32, device=device)
    everyones = torch.empty(dp.size() * longest, dtype=torch.int32, device=device)
    all_gather_flat(everyones, message, dp)
    parts = everyones.view(dp.size(), longest).tolist()
    return [_decode(part[:count]) for part, count in zip(parts, counts.tolist(), strict=True)]


def _decode(numbers: list[int]) -> list[TrainingSequence]:
    sequences, at = [], 0
    while at < len(numbers):
        prompt_slot, rationale_slot, num_sampled, *lengths = numbers[at : at + 6]
        at += 6
        parts = []
        for length in lengths:
            parts.append(tuple(numbers[at : at + length]))
            at += length
        sequences.append(TrainingSequence(prompt_slot, rationale_slot, parts[0], parts[1], num_sampled, parts[2]))
    return sequences
