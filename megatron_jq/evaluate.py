"""F4: sample answers to held-out prompts with the training weights and compare them with the gold ones."""

from dataclasses import dataclass

import torch

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example
from megatron_jq.rollout.engine import RolloutEngine, RolloutRequest, SamplingOptions, share_of_replica


@dataclass(frozen=True)
class Evaluation:
    """exact_match: mean over prompts and samples (pass@1). solved_any: share of prompts that a sample solved."""

    exact_match: float
    solved_any: float
    num_prompts: int
    num_samples: int


def answer_matches(answer_ids: tuple[int, ...], example: Example, tokenizer: Tokenizer) -> bool:
    """Exact match: the sampled answer ended by itself, and its text is the gold text, blanks at the ends aside.

    Control tokens leave no text, so an answer that holds one is refused before the texts are compared.
    """
    control = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.think_open_id, tokenizer.think_close_id}
    if not answer_ids or answer_ids[-1] != tokenizer.eos_id or not control.isdisjoint(answer_ids[:-1]):
        return False
    return tokenizer.decode(list(answer_ids[:-1])).strip() == example.answer_text.strip()


def evaluate(
    engine: RolloutEngine,
    examples: list[Example],
    tokenizer: Tokenizer,
    runtime: Runtime,
    options: SamplingOptions,
    *,
    num_samples: int,
) -> Evaluation:
    """Exact match over `examples`, num_samples each, split over data-parallel replicas; alike on every rank."""
    dp = runtime.groups.dp
    share = share_of_replica(len(examples), num_samples, dp.rank(), dp.size())
    requests = [RolloutRequest(prompt, examples[prompt].prompt_ids, slots) for prompt, slots in share]
    correct = torch.zeros(len(examples), dtype=torch.float64, device=runtime.device)
    for rollout in engine.generate(requests, options):
        if answer_matches(rollout.answer_ids, examples[rollout.prompt_slot], tokenizer):
            correct[rollout.prompt_slot] += 1
    runtime.groups.sum_over_replicas(correct)
    return Evaluation(
        exact_match=correct.mean().item() / num_samples,
        solved_any=(correct > 0).double().mean().item(),
        num_prompts=len(examples),
        num_samples=num_samples,
    )
