"""F4: one update per rollout: from sequences and coefficients to new weights.

The rollout was drawn from the weights that it trains, so the ratio to the sampling policy is 1 and every coefficient is
known before the pass. Several updates on one rollout: clipped_learner.py.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_jq.model.build import TrainingModel
from megatron_jq.objective.table import StepTable
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.train.failures import check_finite
from megatron_jq.train.numerics import Numerics
from megatron_jq.train.passes import BatchOptions, PassResult, train


@dataclass(frozen=True)
class UpdateResult:
    """What a step's update left, alike on every rank. Figures that a learner does not have are None."""

    trained: PassResult  # of the first update's pass; tokens computed and saved are all passes'
    grad_norm: float  # of the last update, before clipping
    loss: float  # the surrogate loss, any penalty included, at the weights before the first update
    kl_reference_mean: float | None = None  # nats per token, at the first update, where it has no bias
    clipped_fraction: float | None = None  # of the tokens with an advantage; mean over updates


class Learner(Protocol):
    def update(self, sequences: list[TrainingSequence], coefficients: Coefficients) -> UpdateResult:
        """Train on a step's sequences; every rank calls it. sequences: this replica's. coefficients: the whole step's.

        Numerics.start has been called for the step. Raises NonFinite on every rank, before the weights change, where a
        likelihood or the gradient is not finite, and RunFailure where float32 cannot hold the update.
        """
        ...


def surrogate_loss(coefficients: Coefficients, table: StepTable) -> float:
    """-(1/B) sum_b (1/M_b) sum_m [rationale ln p(z|x) + answer ln p(y|x,z)] over the sequences of a training pass."""
    c = coefficients.of_loss()
    assert table.log_z_BM is not None and table.log_w_BM is not None, "a training pass computes both"
    return (c.rationale_BM * table.log_z_BM + c.answer_BM * table.log_w_BM)[table.valid_BM].sum().item()


@dataclass(frozen=True)
class OnPolicyLearner:
    """One update per step. `options.loss_scale` is the step's, set here."""

    model: TrainingModel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    numerics: Numerics
    runtime: Runtime
    options: BatchOptions

    def update(self, sequences: list[TrainingSequence], coefficients: Coefficients) -> UpdateResult:
        """As Learner.update."""
        options = self.begin(coefficients)
        self.zero_gradients()
        trained = train(self.model, sequences, coefficients, self.runtime, options)
        grad_norm = self.apply(sequences, trained.table)
        return UpdateResult(trained, grad_norm, surrogate_loss(coefficients, trained.table))

    def begin(self, coefficients: Coefficients) -> BatchOptions:
        """Count the step in the learning-rate schedule, once however many updates it has; choose its loss scale."""
        self.schedule.step(increment=1)
        return replace(self.options, loss_scale=self.numerics.begin(coefficients))

    def zero_gradients(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def apply(self, sequences: list[TrainingSequence], table: StepTable) -> float:
        """Check the pass and its gradient, then let the optimizer step. Returns the norm before clipping."""
        assert table.log_z_BM is not None and table.log_w_BM is not None, "a training pass computes both"
        check_finite("ln p(z|x)", table.log_z_BM[table.valid_BM], sequences)
        check_finite("ln p(y|x,z)", table.log_w_BM[table.valid_BM], sequences)
        with self.runtime.megatron():
            norm = self.numerics.prepare()
            if not math.isfinite(norm):
                check_finite(self.numerics.nonfinite(), torch.tensor(norm), sequences)
            return self.numerics.apply(norm)
