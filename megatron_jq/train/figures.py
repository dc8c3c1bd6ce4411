"""F4: the figures of one step, over all replicas, for metrics.jsonl."""

from dataclasses import dataclass

import torch

from megatron_jq.objective.metrics import effective_sample_size
from megatron_jq.objective.table import StepTable
from megatron_jq.objective.tsallis import log_mean_weight
from megatron_jq.parallel.runtime import Runtime, peak_memory_bytes
from megatron_jq.records import Coefficients, Rollout, StepMetrics, TrainingSequence
from megatron_jq.train.batching import trained_tokens
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.pace import Pace
from megatron_jq.train.passes import Scores
from megatron_jq.train.updates import Trained


@dataclass(frozen=True)
class Tables:
    """The whole step's [B, M] tables, alike on every rank. reward_BM is None where no answer was sampled."""

    log_w_BM: torch.Tensor
    valid_BM: torch.Tensor
    reward_BM: torch.Tensor | None
    coefficients: Coefficients
    scored: Scores
    updates: Trained

    @property
    def trained(self) -> Scores:
        return self.updates.scores

    @property
    def loss(self) -> float:
        """The surrogate loss, any penalty included, at the weights before the (first) update."""
        present_BM, c = self.trained.present_BM, self.coefficients
        log_z_BM, log_y_BM = self.trained.log_rationale_BM, self.trained.log_answer_BM
        surrogate = -(c.rationale_BM * log_z_BM + c.answer_BM * log_y_BM)[present_BM].sum().item()
        return surrogate + self.updates.kl_loss


def step_metrics(
    step: int,
    q: float,
    estimator: Estimator,
    tables: Tables,
    rollouts: list[Rollout],
    sequences: list[TrainingSequence],
    runtime: Runtime,
    *,
    log_prob_mismatch: float | None,
    log_w_mismatch: float | None,
    grad_norm: float,
    lr: float,
    pace: Pace,
    share_prompts: bool,
) -> StepMetrics:
    """rollouts and sequences are this replica's; share_prompts: as the training pass had it. One small
    collective over replicas; all ranks get one result.
    """
    valid_BM = tables.valid_BM
    kept_B = valid_BM.sum(dim=1) >= estimator.minimum_rationales
    log_p_B = log_mean_weight(tables.log_w_BM, valid_BM)[kept_B]
    count, tokens, forced, trained_tokens = _totals(rollouts, sequences, tables.trained, runtime, share_prompts)
    return StepMetrics(
        step=step,
        q=q if estimator.uses_q else None,
        loss=tables.loss,
        log_p_mean=log_p_B.mean().item(),
        p_mean=log_p_B.exp().mean().item(),
        effective_reward_max=estimator.effective_reward_max(
            StepTable(tables.log_w_BM, valid_BM, reward_BM=tables.reward_BM), tables.coefficients, q=q
        ),
        ess_mean=effective_sample_size(tables.log_w_BM, valid_BM)[kept_B].mean().item(),
        grad_norm=grad_norm,
        lr=lr,
        num_rationales_valid=int(count),
        rationale_tokens_mean=tokens / max(count, 1),
        forced_fraction=forced / max(count, 1),
        tokens_trained=int(trained_tokens),
        tokens_computed=tables.scored.tokens_computed + tables.trained.tokens_computed,
        tokens_saved=tables.scored.tokens_saved + tables.trained.tokens_saved,
        seconds_rollout=pace.median[0],
        seconds_score=pace.median[1],
        seconds_train=pace.median[2],
        seconds_rollout_slowest=pace.slowest[0],
        seconds_score_slowest=pace.slowest[1],
        seconds_train_slowest=pace.slowest[2],
        peak_memory_bytes=peak_memory_bytes(runtime),
        log_prob_mismatch_max=log_prob_mismatch,
        log_w_mismatch_max=log_w_mismatch,
        reward_mean=None if tables.reward_BM is None else tables.reward_BM[valid_BM].mean().item(),
        kl_reference_mean=tables.updates.kl_reference_mean,
        clipped_fraction=tables.updates.clipped_fraction,
        expert_balance=tables.trained.expert_balance,
    )


def _totals(rollouts, sequences, trained: Scores, runtime: Runtime, share_prompts: bool) -> list[float]:
    """Valid rationales, their tokens, how many were closed by force, and tokens that were trained on."""
    valid = [r for r in rollouts if r.valid]
    passed = trained_tokens(sequences, trained.present_BM, share_prompts=share_prompts)
    totals = [len(valid), sum(len(r.rationale_ids) for r in valid), sum(r.forced for r in valid), passed]
    return runtime.groups.sum_over_replicas(torch.tensor(totals, dtype=torch.float64, device=runtime.device)).tolist()
