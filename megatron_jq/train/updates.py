"""F4: several updates on one rollout, with clipped ratios and a penalty on the KL to a reference (GRPO's).

The micro-batches are cut once and lie on the same replicas in every pass, so ln p of each token at the first update,
and under the reference, wait on the last stage of the rank that needs them: nothing is exchanged but sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.model.build import TrainingModel
from megatron_jq.model.rows import ScoreHead
from megatron_jq.objective.clipping import TokenFigures, TokenRule
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.train.passes import (
    BatchOptions,
    Scores,
    begin_expert_balance,
    complete_table,
    run_batches,
    train,
    training_batches,
    with_expert_balance,
)


@dataclass(frozen=True)
class OffPolicy:
    """What gives each token a coefficient of its own, by the current policy: objective/clipping.py.

    kl_weight_BM: beta with all denominators, float64; None without a reference. old, reference: ln p of each
    micro-batch's scored tokens, at the first update and of the reference, on the last stage (empty lists elsewhere).
    old None: this is the first update.
    """

    lower: float
    upper: float
    kl_weight_BM: torch.Tensor | None = None
    old: list[torch.Tensor] | None = None
    reference: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class Updated:
    """An update's pass, token by token. log_prob: OffPolicy.old of the next ones. figures: alike on all ranks."""

    scores: Scores
    log_prob: list[torch.Tensor]
    figures: TokenFigures


def train_by_token(
    model: TrainingModel,
    batches: list[list[TrainingSequence]],
    coefficients: Coefficients,
    off_policy: OffPolicy,
    runtime: Runtime,
    options: BatchOptions,
) -> Updated:
    """`train` with the loss of objective/clipping.py, on micro-batches of training_batches, which stay the same for all
    updates of a rollout. The loss of all replicas is a plain sum over tokens here too.
    """

    def head_of(number: int, head: ScoreHead) -> ScoreHead:
        old_N = None if off_policy.old is None else off_policy.old[number]
        reference_N = None if off_policy.reference is None else off_policy.reference[number]
        weight_N = None
        if off_policy.kl_weight_BM is not None:
            slots = [off_policy.kl_weight_BM[s.prompt_slot, s.rationale_slot].item() for s in batches[number]]
            weight_N = torch.tensor(slots, dtype=torch.float64, device=runtime.device)[head.cell_N // 2]
            weight_N *= options.loss_scale
        rule = TokenRule(off_policy.lower, off_policy.upper, old_N, reference_N, weight_N)
        return replace(head, by_token=True, rule=rule)

    begin_expert_balance(model, batches, runtime, options)
    scaled = coefficients.times(options.loss_scale)
    results = run_batches(model, batches, runtime, options, with_rationale=True, coefficients=scaled, head_of=head_of)
    shape = tuple(coefficients.answer_BM.shape)
    scores = complete_table(model, [table for table, _, _ in results], batches, shape, runtime, options)
    sums = torch.zeros(len(fields(TokenFigures)), dtype=torch.float64, device=runtime.device)
    for _, _, figures in results:
        sums += figures
    runtime.groups.sum_over_replicas(runtime.groups.from_last_stage(sums))
    log_prob = [tokens for _, tokens, _ in results]
    figures = TokenFigures(*sums.tolist())
    figures = replace(figures, kl_loss=figures.kl_loss / options.loss_scale)
    return Updated(with_expert_balance(model, scores, runtime), log_prob, figures)


def token_log_probs(
    model: TrainingModel, batches: list[list[TrainingSequence]], runtime: Runtime, options: BatchOptions
) -> list[torch.Tensor]:
    """ln p of each micro-batch's scored tokens under another model, as OffPolicy takes them; bit for bit the trained
    model's where the weights are.
    """
    by_token = lambda number, head: replace(head, by_token=True)  # noqa: E731
    with torch.no_grad():
        results = run_batches(
            model, batches, runtime, options, with_rationale=True, coefficients=None, head_of=by_token
        )
    return [log_prob for _, log_prob in results]


@dataclass(frozen=True)
class Trained:
    """What a step's updates left. The figures that go with an estimator's settings are None under others."""

    scores: Scores  # of the first update's pass; tokens computed and saved are all passes'
    grad_norm: float  # of the last update
    kl_loss: float = 0.0  # the penalty at the first update, a part of the loss
    kl_reference_mean: float | None = None  # nats a token, at the first update: there it estimates the KL without bias
    clipped_fraction: float | None = None  # of the tokens with an advantage; mean over updates


@dataclass(frozen=True)
class Updates:
    """How a rollout is trained on. reference None: no penalty; beta is in kl_weight_BM."""

    model: TrainingModel
    optimizer: MegatronOptimizer
    reference: TrainingModel | None
    iterations: int
    clamp_eps_lower: float
    clamp_eps_upper: float
    runtime: Runtime
    options: BatchOptions

    def run(
        self,
        sequences: list[TrainingSequence],
        coefficients: Coefficients,
        kl_weight_BM: torch.Tensor | None,
        update: Callable[[Scores], float],
    ) -> Trained:
        """All updates. sequences: this replica's. update: check, step the optimizer, return the gradient's norm.

        One update without a reference is on the policy that sampled: the ratio is 1, and the coefficients are known
        before the pass.
        """
        if self.iterations == 1 and self.reference is None:
            self._zero_gradients()
            scores = train(self.model, sequences, coefficients, self.runtime, self.options)
            return Trained(scores, update(scores))
        with_kl = self.reference is not None
        model, runtime, options = self.model, self.runtime, self.options
        batches = training_batches(model, sequences, coefficients, runtime, options, kl_weight_BM=kl_weight_BM)
        off_policy = OffPolicy(self.clamp_eps_lower, self.clamp_eps_upper)
        if with_kl:
            log_prob = token_log_probs(self.reference, batches, runtime, options)
            off_policy = replace(off_policy, kl_weight_BM=kl_weight_BM, reference=log_prob)
        done: list[Updated] = []
        for _ in range(self.iterations):
            self._zero_gradients()
            done.append(train_by_token(model, batches, coefficients, off_policy, runtime, options))
            grad_norm = update(done[-1].scores)
            off_policy = replace(off_policy, old=done[0].log_prob)
        first, passes = done[0], self.iterations + with_kl
        scores = replace(
            first.scores,
            tokens_computed=passes * first.scores.tokens_computed,
            tokens_saved=passes * first.scores.tokens_saved,
        )
        clipped = sum(each.figures.clipped_fraction for each in done) / self.iterations
        return Trained(
            scores,
            grad_norm,
            first.figures.kl_loss,
            first.figures.kl_mean if with_kl else None,
            clipped if self.iterations > 1 else None,
        )

    def _zero_gradients(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
