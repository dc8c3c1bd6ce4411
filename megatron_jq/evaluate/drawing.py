"""F4: sample answers to held-out prompts with the policy's weights, over all replicas, and judge them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_jq.data.round_trips import read_back, text_of
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.evaluate.judging import Answer, Judge, Metric, judge_prompt
from megatron_jq.evaluate.reward import Reward
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
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
    ended = bool(answer_ids) and answer_ids[-1] == tokenizer.eos_id
    return Answer(text_of(answer_ids, tokenizer), ended)


def golds_of(example: Example, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Every text that counts as right: y*, its aliases, and what the tokenizer makes of each where that is another.

    A policy that samples y*'s own ids says decode(encode(y*)), and this need not be y* (data/round_trips.py).
    """
    back = (read_back(text, tokenizer) for text in example.aliases)
    says = (text_of(example.answer_ids, tokenizer), *(text for text in back if text is not None))
    return tuple(dict.fromkeys((example.answer_text, *example.aliases, *says)))


def answer_matches(answer_ids: tuple[int, ...], example: Example, tokenizer: Tokenizer) -> bool:
    """Exact match: the sampled answer ended by itself, and its ids are y*'s or its text is one of golds_of's, blanks at
    the ends aside.
    """
    if answer_ids == example.answer_ids:
        return True
    return Judge().is_right(answer_of(answer_ids, tokenizer), golds_of(example, tokenizer))


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
    rollouts = engine.generate(requests, options)
    if dp.size() == 1:
        return rollouts
    everyones: list[list[Rollout]] = [[]] * dp.size()
    dist.all_gather_object(everyones, rollouts, group=dp)
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
    reward: Reward | None = None,
) -> Evaluation:
    """Accuracy over `examples`, num_samples each, split over data-parallel replicas; alike on every rank.

    Rank 0 judges: what a process with a deadline or the user's own function says must be the same everywhere. reward:
    asked under match "reward" alone. RunFailure on every rank where it fails.
    """
    rollouts = draw(engine, examples, runtime, options, num_samples=num_samples)
    reward = reward if judge.match == "reward" else None
    work = lambda: _judged(rollouts, examples, tokenizer, num_samples, judge, reward)  # noqa: E731
    shared = [on_all_ranks(runtime, work, main_only=True)]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _judged(
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    num_samples: int,
    judge: Judge,
    reward: Reward | None,
) -> Evaluation:
    exact = passed = majority = 0.0
    for row, example in enumerate(examples):
        drawn = rollouts[row * num_samples : (row + 1) * num_samples]
        answers, golds = [answer_of(rollout.answer_ids, tokenizer) for rollout in drawn], golds_of(example, tokenizer)
        if reward is not None:
            values = (reward.of(rollout, example, golds, tokenizer) for rollout in drawn)
            answers = [replace(answer, reward=value) for answer, value in zip(answers, values, strict=True)]
        judged = judge_prompt(answers, golds, judge)
        exact += judge_prompt(answers, golds, Judge()).value(Metric("pass", 1))
        passed += judged.value(Metric("pass", num_samples))
        majority += judged.value(Metric("maj", num_samples))
    count = len(examples)
    return Evaluation(exact / count, passed / count, majority / count, count, num_samples)
