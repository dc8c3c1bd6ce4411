"""F4: how a step's sequences are laid out in rows: shares of replicas, micro-batches, prompts that are computed once.

The arithmetic of train/batching.py and model/rows.py for sequences of equal lengths, without torch; tests compare the
two. A sequence is its slot in the step's flat [B, M] table; one prompt's are neighbours.
"""

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Sequences of one prompt that share it in a row, or one sequence."""

    slot: int  # the first one's
    sequences: int


@dataclass(frozen=True)
class Row:
    """One micro-batch."""

    units: tuple[int, ...]  # sequences of each
    tokens: int  # padding included
    tokens_unshared: int  # the same sequences, each with a prompt of its own
    pairs: int  # of a token and a key it attends to; what ragged segments are padded with is left out

    @property
    def sequences(self) -> int:
        return sum(self.units)


@dataclass(frozen=True)
class Layout:
    """Lengths in tokens, and how sequences are laid out."""

    prompt: int
    branch: int  # rationale with its close token, and answer
    num_rationales: int  # M
    share_prompts: bool
    sequence_multiple: int  # to which a sequence, or a branch, is padded
    row_multiple: int  # sequence parallelism cuts a row into so many parts

    def _padded(self, length: int) -> int:
        return -(-length // self.sequence_multiple) * self.sequence_multiple

    def _tree(self, sequences: int) -> bool:
        """Whether that many of one prompt share it: where it takes fewer tokens (model/rows.py: sharing_pays)."""
        tree = self.prompt + sequences * self._padded(self.branch)
        return sequences > 1 and tree < sequences * self._padded(self.prompt + self.branch)

    def unit_tokens(self, sequences: int) -> int:
        if not self._tree(sequences):
            return sequences * self._padded(self.prompt + self.branch)
        return self.prompt + sequences * self._padded(self.branch)

    def unit_pairs(self, sequences: int) -> int:
        """Causal in the prompt and in each branch, dense between the two."""
        if not self._tree(sequences):
            return sequences * causal(self._padded(self.prompt + self.branch))
        branch = self._padded(self.branch)
        return causal(self.prompt) + sequences * (branch * self.prompt + causal(branch))

    def unit_cost(self, sequences: int, hidden_size: int) -> float:
        """Work by which replicas are balanced (train/batching.py: Unit.cost)."""
        if not self._tree(sequences):
            length = self.prompt + self.branch
            return sequences * (length + length**2 / (6 * hidden_size))
        branches = sequences * self.branch
        pairs = self.prompt**2 / 2 + self.prompt * branches + sequences * self.branch**2 / 2
        return self.prompt + branches + pairs / (3 * hidden_size)

    def units(self, slots: Iterable[int]) -> list[Unit]:
        """Neighbouring sequences of one prompt; each by itself where prompts are not shared."""
        if not self.share_prompts:
            return [Unit(slot, 1) for slot in slots]
        groups = [list(group) for _, group in itertools.groupby(slots, key=lambda slot: slot // self.num_rationales)]
        return [Unit(group[0], len(group)) for group in groups]

    def row(self, units: list[Unit]) -> Row:
        """An empty row is padding that belongs to nothing."""
        counts = tuple(unit.sequences for unit in units)
        tokens, alone = sum(map(self.unit_tokens, counts)), sum(counts) * self.unit_tokens(1)
        multiple = self.row_multiple
        padded, unshared = (-(-n // multiple) * multiple or multiple for n in (tokens, alone))
        return Row(counts, padded, unshared, sum(map(self.unit_pairs, counts)) + causal(padded - tokens))

    def rows_by_count(self, slots: list[int], micro_batch_size: int) -> list[Row]:
        """micro_batch_size sequences at a time; never none."""
        parts = [slots[i : i + micro_batch_size] for i in range(0, len(slots), micro_batch_size)] or [[]]
        return [self.row(self.units(part)) for part in parts]

    def rows_by_tokens(self, slots: list[int], max_tokens: int) -> list[Row]:
        """First-fit decreasing into rows of at most max_tokens; never none."""
        fitting = [piece for unit in self.units(slots) for piece in self._within(unit, max_tokens)]
        smallest = min((self.unit_tokens(unit.sequences) for unit in fitting), default=0)
        rows: list[list[Unit]] = []
        room: list[int] = []
        first = 0  # of the rows that still take something
        for unit in sorted(fitting, key=lambda u: (-self.unit_tokens(u.sequences), u.slot)):
            tokens = self.unit_tokens(unit.sequences)
            while first < len(rows) and room[first] < smallest:
                first += 1
            position = next((i for i in range(first, len(rows)) if room[i] >= tokens), len(rows))
            if position == len(rows):
                rows.append([])
                room.append(max_tokens)
            rows[position].append(unit)
            room[position] -= tokens
        return [self.row(units) for units in rows or [[]]]

    def _within(self, unit: Unit, max_tokens: int) -> list[Unit]:
        shared = (max_tokens - self.prompt) // self._padded(self.branch)
        return self._cut(unit, max(1, shared, max_tokens // self._padded(self.prompt + self.branch)))

    @staticmethod
    def _cut(unit: Unit, size: int) -> list[Unit]:
        starts = range(0, unit.sequences, size)
        return [Unit(unit.slot + start, min(size, unit.sequences - start)) for start in starts]

    def balanced(self, total: int, replicas: int, hidden_size: int) -> list[list[int]]:
        """Return the slots of each replica once the step's `total` sequences are shared out again by cost (balance)."""
        units = self.units(range(total))
        fair = sum(self.unit_cost(unit.sequences, hidden_size) for unit in units) / replicas
        moved = []
        for unit in units:
            parts = math.ceil(self.unit_cost(unit.sequences, hidden_size) / max(fair, 1.0))
            moved += self._cut(unit, -(-unit.sequences // max(parts, 1)))
        shares: list[list[int]] = [[] for _ in range(replicas)]
        loads = [(0.0, replica) for replica in range(replicas)]
        for unit in sorted(moved, key=lambda u: (-self.unit_cost(u.sequences, hidden_size), u.slot)):
            load, replica = loads[0]  # the least loaded one, the first among equals
            heapq.heapreplace(loads, (load + self.unit_cost(unit.sequences, hidden_size), replica))
            shares[replica] += range(unit.slot, unit.slot + unit.sequences)
        return [sorted(share) for share in shares]


def causal(tokens: int) -> int:
    """Pairs of a token and a key of a sequence: each attends to itself and to those before it."""
    return tokens * (tokens + 1) // 2
