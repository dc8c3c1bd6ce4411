"""F4: what pretraining does in a way of its own: a replica reads its rows alone, and the loss is a mean over tokens."""

from collections.abc import Sequence

import torch

from megatron_jq.model.rows import scored_places
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, TrainingSequence


class Batch(Sequence[Example]):
    """Some of the examples, each read when it is first asked for: a replica asks for its own share of a step's rows."""

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]):
        self._examples, self._indices = examples, indices
        self._read: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, slot: int) -> Example:
        """As the examples raise; IndexError beyond the last slot."""
        if slot not in self._read:
            self._read[slot] = self._examples[self._indices[slot]]
        return self._read[slot]


def scored_tokens(sequences: list[TrainingSequence], mask_loss_after_id: int | None, runtime: Runtime) -> int:
    """Answer tokens that are scored, over all replicas: one all-reduce of a number. sequences: this replica's."""
    count = 0
    for s in sequences:
        ids = (*s.prompt_ids, *s.rationale_ids, *s.answer_ids)
        count += len(scored_places(ids, len(ids) - len(s.answer_ids), len(ids), mask_loss_after_id))
    total = torch.tensor(count, dtype=torch.float64, device=runtime.device)
    return int(runtime.groups.sum_over_replicas(total).item())
