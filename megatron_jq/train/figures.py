"""F4: the figures of one step, over all replicas, for metrics.jsonl."""

import torch

from megatron_jq.objective.metrics import effective_sample_size
from megatron_jq.objective.table import StepTable
from megatron_jq.objective.tsallis import log_mean_weight
from megatron_jq.parallel.runtime import Runtime, peak_memory_bytes
from megatron_jq.records import Coefficients, Rollout, StepMetrics, TrainingSequence
from megatron_jq.train.batching import trained_tokens
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.learner import UpdateResult
from megatron_jq.train.pace import Pace
from megatron_jq.train.passes import PassResult


def step_metrics(
    step: int,
    q: float,
    estimator: Estimator,
    table: StepTable,
    coefficients: Coefficients,
    scored: PassResult | None,
    update: UpdateResult,
    rollouts: list[Rollout],
    sequences: list[TrainingSequence],
    runtime: Runtime,
    *,
    lr: float,
    pace: Pace,
    share_prompts: bool,
    log_prob_mismatch: float | None = None,
) -> StepMetrics:
    """One line of metrics.jsonl, alike on every rank, for one small all-reduce over replicas.

    scored: the scoring pass; None where a step had none. rollouts, sequences: this replica's. share_prompts: as the
    training pass had it.
    """
    valid_BM, trained = table.valid_BM, update.trained
    computed = [result for result in (scored, trained) if result is not None]
    in_batch_B = valid_BM.sum(dim=1) >= estimator.minimum_rationales
    assert table.log_w_BM is not None, "a scoring or training pass computes it"
    log_p_B = log_mean_weight(table.log_w_BM, valid_BM)[in_batch_B]
    count, tokens, forced, trained_tokens = _totals(rollouts, sequences, trained.table, runtime, share_prompts)
    return StepMetrics(
        step=step,
        q=q if estimator.uses_q else None,
        loss=update.loss,
        log_p_mean=log_p_B.mean().item(),
        p_mean=log_p_B.exp().mean().item(),
        effective_reward_max=estimator.effective_reward_max(table, coefficients, q=q),
        ess_mean=effective_sample_size(table.log_w_BM, valid_BM)[in_batch_B].mean().item(),
        grad_norm=update.grad_norm,
        lr=lr,
        num_rationales_valid=int(count),
        rationale_tokens_mean=tokens / max(count, 1),
        forced_fraction=forced / max(count, 1),
        tokens_trained=int(trained_tokens),
        tokens_computed=sum(result.tokens_computed for result in computed),
        tokens_saved=sum(result.tokens_saved for result in computed),
        seconds_rollout=pace.median[0],
        seconds_score=pace.median[1],
        seconds_train=pace.median[2],
        seconds_rollout_slowest=pace.slowest[0],
        seconds_score_slowest=pace.slowest[1],
        seconds_train_slowest=pace.slowest[2],
        peak_memory_bytes=peak_memory_bytes(runtime),
        log_prob_mismatch_max=log_prob_mismatch,
        log_w_mismatch_max=None if scored is None else scored.log_w_mismatch_max,
        reward_mean=None if table.reward_BM is None else table.reward_BM[valid_BM].mean().item(),
        kl_reference_mean=update.kl_reference_mean,
        clipped_fraction=update.clipped_fraction,
        expert_balance=trained.expert_balance,
    )


def _totals(rollouts, sequences, trained: StepTable, runtime: Runtime, share_prompts: bool) -> list[float]:
    """Valid rationales, their tokens, how many were closed by force, and tokens that were trained on."""
    valid = [r for r in rollouts if r.valid]
    passed = trained_tokens(sequences, trained.valid_BM, share_prompts=share_prompts)
    totals = [len(valid), sum(len(r.rationale_ids) for r in valid), sum(r.forced for r in valid), passed]
    return runtime.groups.sum_over_replicas(torch.tensor(totals, dtype=torch.float64, device=runtime.device)).tolist()
