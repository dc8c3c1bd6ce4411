"""F4: what a step asks its engine for, and makes of the rollouts: the passes' sequences, sampled answers' rewards."""

import torch
import torch.distributed as dist

from megatron_jq.config import Config
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.evaluate import answer_matches
from megatron_jq.evaluate.drawing import golds_of
from megatron_jq.evaluate.reward import Reward
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.records import Example, Rollout, TrainingSequence
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions, requests_of_replica
from megatron_jq.seeds import rollout_seed
from megatron_jq.train.pretraining import Batch
from megatron_jq.train.setup import DataSets


def requests_of(prompts: Batch, config: Config, data: DataSets, runtime: Runtime) -> list[RolloutRequest]:
    """What this replica's engine is asked for. UserError on every rank for a bad row of a corpus."""
    r, dp = config.rollout, runtime.groups.dp
    scored = r.score_with == "rollout"
    ask = lambda: requests_of_replica(prompts, r.num_rationales, dp.rank(), dp.size(), score=scored)  # noqa: E731
    # A corpus's rows are read here, each by its replica alone: one that is bad must end all of them.
    return ask() if data.corpus is None else on_all_ranks(runtime, ask)


def sampling_options(step: int, config: Config, data: DataSets, *, samples_answers: bool) -> SamplingOptions:
    """How a step's rationales are drawn, and with samples_answers their answers."""
    r = config.rollout
    return SamplingOptions(
        rationale_budget=r.rationale_budget,
        answer_budget=data.answer_budget if samples_answers else 0,
        temperature=r.temperature,
        top_p=r.top_p,
        close_id=data.tokenizer.think_close_id,
        eos_id=data.tokenizer.eos_id,
        seed=rollout_seed(config.training.seed),
        step=step,
    )


def sequences_of(rollouts: list[Rollout], prompts: Batch | list[Example], *, gold: bool) -> list[TrainingSequence]:
    """The valid rollouts with y* (gold), or each with the answer that was sampled after it."""
    return [
        TrainingSequence(
            rollout.prompt_slot,
            rollout.rationale_slot,
            example.prompt_ids,
            example.joined(rollout.rationale_ids),
            rollout.num_sampled,
            example.answer_ids if gold else rollout.answer_ids,
        )
        for rollout in rollouts
        if rollout.valid
        for example in [prompts[rollout.prompt_slot]]
    ]


def rewards(
    rollouts: list[Rollout],
    prompts: Batch | list[Example],
    shape: tuple[int, int],
    tokenizer: Tokenizer,
    runtime: Runtime,
    reward: Reward | None = None,
) -> torch.Tensor:
    """1 where the sampled answer matches the gold one, or what the user's reward says, [B, M] float64, completed over
    replicas. RunFailure on every rank where the user's reward fails.
    """
    reward_BM = torch.zeros(shape, dtype=torch.float64)
    if reward is not None:
        groups = runtime.groups
        asked = rollouts if groups.tp.rank() == 0 and groups.pp.rank() == 0 else []  # once a sample, on any layout
        on_all_ranks(runtime, lambda: _ask(reward, reward_BM, asked, prompts, tokenizer))
        completed = reward_BM.to(runtime.device)
        dist.all_reduce(completed, group=groups.world)
        return completed.cpu()
    for r in rollouts:
        if answer_matches(r.answer_ids, prompts[r.prompt_slot], tokenizer):
            reward_BM[r.prompt_slot, r.rationale_slot] = 1.0
    return runtime.groups.sum_over_replicas(reward_BM.to(runtime.device)).cpu()


def _ask(
    reward: Reward,
    reward_BM: torch.Tensor,
    rollouts: list[Rollout],
    prompts: Batch | list[Example],
    tokenizer: Tokenizer,
) -> None:
    for r in rollouts:
        if r.valid:
            example = prompts[r.prompt_slot]
            value = reward.of(r, example, golds_of(example, tokenizer), tokenizer)
            reward_BM[r.prompt_slot, r.rationale_slot] = value
