"""F4: what a step makes of its rollouts: the sequences that the passes take, and the rewards of sampled answers."""

import torch

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.evaluate import answer_matches
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, Rollout, Sequence
from megatron_jq.train.pretraining import Batch


def sequences_of(rollouts: list[Rollout], prompts: Batch | list[Example], *, gold: bool) -> list[Sequence]:
    """The valid rollouts with y* (gold), or each with the answer that was sampled behind it."""
    return [
        Sequence(
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
) -> torch.Tensor:
    """1 where the sampled answer matches the gold one, [B, M] float64, completed over replicas."""
    reward_BM = torch.zeros(shape, dtype=torch.float64)
    for r in rollouts:
        if answer_matches(r.answer_ids, prompts[r.prompt_slot], tokenizer):
            reward_BM[r.prompt_slot, r.rationale_slot] = 1.0
    return runtime.groups.sum_over_replicas(reward_BM.to(runtime.device)).cpu()
