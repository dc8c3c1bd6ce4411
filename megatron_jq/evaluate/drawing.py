"""F4: sample answers to held-out prompts with the policy's weights, over all replicas, and judge them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.evaluate.judging import Answer, Judge, Metric, judge_prompt
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.records import Example, Rollout
from megatron_jq.rollout.engine import RolloutEngine, SamplingOptions, requests_of_replica


@dataclass(frozen=True)
class Evaluation:
    """Means over prompts. exact_match: over all samples, of the text as it is, whatever the judge; the others are the
    judge's, at k = num_samples.
    """

    exact_match: float
    pass_at_k: float
    maj_at_k: float
    num_prompts: int
    num_samples: int


def answer_of(answer_ids: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """The text of a sampled answer. Control tokens leave no text, so what they part is kept apart by U+FFFD."""
    control = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.think_open_id, tokenizer.think_close_id}
    ended = bool(answer_ids) and answer_ids[-1] == tokenizer.eos_id
    parts: list[list[int]] = [[]]
    for token in answer_ids[: len(answer_ids) - ended]:
        if token in control:
            parts.append([])
        else:
            parts[-1].append(token)
    return Answer("\ufffd".join(tokenizer.decode(part) for part in parts), ended)


def golds_of(example: Example) -> tuple[str, ...]:
    """Every answer that counts as right: y* first, then its aliases."""
    return (example.answer_text, *example.aliases)


def answer_matches(answer_ids: tuple[int, ...], example: Example, tokenizer: Tokenizer) -> bool:
    """Exact match: the sampled answer ended by itself, and its text is the gold text or an alias, blanks at the ends
    aside.
    """
    return Judge().is_right(answer_of(answer_ids, tokenizer), golds_of(example))


def draw(
    engine: RolloutEngine,
    examples: Sequence[Example],
    runtime: Runtime,
    options: SamplingOptions,
    *,
    num_samples: int,
    first: int = 0,
    score: bool = False,
) -> list[Rollout]:
    """num_samples rollouts of each example, in order, shared out over replicas and alike on every rank.

    first: the prompt slot of the first example; the slots key the random numbers. score: with ln p(y*|x,z).
    """
    dp = runtime.groups.dp
    requests = requests_of_replica(examples, num_samples, dp.rank(), dp.size(), first=first, score=score)
    mine = engine.generate(requests, options)
    if dp.size() == 1:
        return mine
    everyones: list[list[Rollout]] = [[]] * dp.size()
    dist.all_gather_object(everyones, mine, group=dp)
    return [rollout for replica in everyones for rollout in replica]  # a replica's share is a range of the slots


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    runtime: Runtime,
    options: SamplingOptions,
    *,
    num_samples: int,
    judge: Judge = Judge(),  # noqa: B008 (frozen)
) -> Evaluation:
    """Accuracy over `examples`, num_samples each, split over data-parallel replicas; alike on every rank."""
    rollouts = draw(engine, examples, runtime, options, num_samples=num_samples)
    exact = passed = majority = 0.0
    for row, example in enumerate(examples):
        drawn = rollouts[row * num_samples : (row + 1) * num_samples]
        answers, golds = [answer_of(rollout.answer_ids, tokenizer) for rollout in drawn], golds_of(example)
        judged = judge_prompt(answers, golds, judge)
        exact += judge_prompt(answers, golds, Judge()).value(Metric("pass", 1))
        passed += judged.value(Metric("pass", num_samples))
        majority += judged.value(Metric("maj", num_samples))
    count = len(examples)
    return Evaluation(exact / count, passed / count, majority / count, count, num_samples)
