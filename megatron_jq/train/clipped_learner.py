"""F4: several updates on one rollout, with clipped ratios and a penalty on the KL to a reference (GRPO's).

The micro-batches are cut once and lie on the same replicas in every pass, so ln p of each token at the first update,
and under the reference, wait on the last stage of the rank that needs them: nothing is exchanged but sums.
"""

from dataclasses import dataclass, fields, replace

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_jq.model.build import TrainingModel
from megatron_jq.model.rows import ScoreHead
from megatron_jq.objective.clipping import TokenFigures, TokenRule
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Coefficients, TrainingSequence
from megatron_jq.train.learner import OnPolicyLearner, UpdateResult, surrogate_loss
from megatron_jq.train.passes import (
    BatchOptions,
    PassResult,
    begin_expert_balance,
    complete_table,
    schedule_arguments,
    training_batches,
    with_expert_balance,
)


@dataclass(frozen=True)
class OffPolicy:
    """What gives each token a coefficient of its own, by the current policy: objective/clipping.py.

    old, reference: ln p of each micro-batch's scored tokens, at the first update and of the reference, on the last
    stage (empty lists elsewhere). old None: this is the first update. reference None: there is none.
    """

    lower: float
    upper: float
    old: list[torch.Tensor] | None = None
    reference: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class TokenPass:
    """An update's pass, token by token. log_prob: OffPolicy.old of the next ones. figures: alike on all ranks."""

    result: PassResult
    log_prob: list[torch.Tensor]
    figures: TokenFigures


def train_by_token(
    model: TrainingModel,
    batches: list[list[TrainingSequence]],
    coefficients: Coefficients,
    off_policy: OffPolicy,
    runtime: Runtime,
    options: BatchOptions,
) -> TokenPass:
    """`train` with the loss of objective/clipping.py, on micro-batches of training_batches, which stay the same for all
    updates of a rollout. The loss of all replicas is a plain sum over tokens here too.
    """

    kl_weight_BM = coefficients.of_loss(options.loss_scale).kl_weight_BM

    def head_of(number: int, head: ScoreHead) -> ScoreHead:
        old_N = None if off_policy.old is None else off_policy.old[number]
        reference_N = None if off_policy.reference is None else off_policy.reference[number]
        weight_N = None
        if kl_weight_BM is not None:
            weights = [kl_weight_BM[s.prompt_slot, s.rationale_slot].item() for s in batches[number]]
            weight_N = torch.tensor(weights, dtype=torch.float64, device=runtime.device)[head.cell_N // 2]
        rule = TokenRule(off_policy.lower, off_policy.upper, old_N, reference_N, weight_N)
        return replace(head, by_token=True, rule=rule)

    begin_expert_balance(model, batches, runtime, options)
    arguments = schedule_arguments(model, batches, runtime, options, coefficients=coefficients, head_of=head_of)
    with runtime.megatron():
        outputs = get_forward_backward_func()(**arguments)
    prompts, rationales = coefficients.answer_BM.shape
    shape = prompts, rationales
    result = complete_table(model, outputs, batches, shape, runtime, options)
    sums = torch.zeros(len(fields(TokenFigures)), dtype=torch.float64, device=runtime.device)
    for output in outputs:
        sums += output.rule_sums
    runtime.groups.sum_over_replicas(runtime.groups.from_last_stage(sums))
    figures = TokenFigures(*sums.tolist())
    figures = replace(figures, kl_loss=figures.kl_loss / options.loss_scale)
    return TokenPass(with_expert_balance(model, result, runtime), [output.log_prob_N for output in outputs], figures)


def token_log_probs(
    model: TrainingModel, batches: list[list[TrainingSequence]], runtime: Runtime, options: BatchOptions
) -> list[torch.Tensor]:
    """ln p of each micro-batch's scored tokens under another model, as OffPolicy takes them; bit for bit the trained
    model's where the weights are.
    """
    by_token = lambda number, head: replace(head, by_token=True)  # noqa: E731
    arguments = schedule_arguments(model, batches, runtime, options, head_of=by_token)
    with torch.no_grad(), runtime.megatron():
        outputs = get_forward_backward_func()(**arguments)
    return [output.log_prob_N for output in outputs]


@dataclass(frozen=True)
class ClippedLearner(OnPolicyLearner):
    """GRPO's several updates on one rollout, held to a reference where there is one.

    The first update is on the policy that sampled: the ratio is 1. With a reference there is Coefficients.kl_weight_BM.
    """

    reference: TrainingModel | None
    iterations: int
    lower: float  # bounds of the ratio: 1 - lower, 1 + upper
    upper: float

    def update(self, sequences: list[TrainingSequence], coefficients: Coefficients) -> UpdateResult:
        """As Learner.update."""
        model, runtime, options = self.model, self.runtime, self.begin(coefficients)
        batches = training_batches(model, sequences, coefficients, runtime, options)
        off_policy = OffPolicy(self.lower, self.upper)
        if self.reference is not None:
            off_policy = replace(off_policy, reference=token_log_probs(self.reference, batches, runtime, options))
        updates: list[TokenPass] = []
        for _ in range(self.iterations):
            self.zero_gradients()
            updates.append(train_by_token(model, batches, coefficients, off_policy, runtime, options))
            grad_norm = self.apply(sequences, updates[-1].result.table)
            off_policy = replace(off_policy, old=updates[0].log_prob)
        first, passes = updates[0], self.iterations + (self.reference is not None)
        clipped = sum(update.figures.clipped_fraction for update in updates) / self.iterations
        return UpdateResult(
            replace(
                first.result,
                tokens_computed=passes * first.result.tokens_computed,
                tokens_saved=passes * first.result.tokens_saved,
            ),
            grad_norm,
            surrogate_loss(coefficients, first.result.table) + first.figures.kl_loss,
            kl_reference_mean=None if self.reference is None else first.figures.kl_mean,
            clipped_fraction=clipped if self.iterations > 1 else None,
        )
