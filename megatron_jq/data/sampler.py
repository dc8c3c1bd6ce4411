"""F2: which prompts a step trains on, as a pure function of the step, so that a resumed run needs the step alone."""

import functools
import random
from dataclasses import dataclass

from megatron_jq.errors import UserError


@dataclass(frozen=True)
class PromptSampler:
    """Every epoch is a permutation of all examples, drawn from (seed, epoch); no example is dropped.

    The epochs are laid end to end and cut into batches of B, so a batch may span two epochs, and then may hold one
    example twice: in two slots, with rationales of its own in each.
    """

    num_examples: int
    prompts_per_step: int  # B
    seed: int

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1:
            raise UserError(f"--prompts-per-step {self.prompts_per_step} is below 1; use at least 1")
        if self.prompts_per_step > self.num_examples:
            raise UserError(
                f"--prompts-per-step {self.prompts_per_step} is more than the {self.num_examples} training examples; "
                f"use at most {self.num_examples}, or give more data"
            )

    def batch(self, step: int) -> list[int]:
        """The B positions in the data set that step `step` (0-based) trains on."""
        if step < 0:
            raise ValueError(f"step {step} is below 0; steps count from 0")
        first = step * self.prompts_per_step
        return [self._at(place) for place in range(first, first + self.prompts_per_step)]

    def epoch(self, step: int) -> int:
        """The epoch that the first prompt of the step belongs to, 0-based."""
        return step * self.prompts_per_step // self.num_examples

    def _at(self, place: int) -> int:
        epoch, position = divmod(place, self.num_examples)
        return _permutation(self.num_examples, self.seed, epoch)[position]


@dataclass(frozen=True)
class InOrder:
    """Batches of a data set that is as long as the run and lies in the order of training."""

    prompts_per_step: int  # B

    def batch(self, step: int) -> list[int]:
        """As PromptSampler.batch."""
        return list(range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step))


@functools.lru_cache(maxsize=2)  # a batch looks at two epochs at most
def _permutation(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Sorted by random() rather than shuffled: of Python's generators only random() is promised to stay the same.
    draw = random.Random(f"megatron-jq prompts {seed} {epoch}")
    keys = [draw.random() for _ in range(num_examples)]
    return tuple(sorted(range(num_examples), key=keys.__getitem__))
