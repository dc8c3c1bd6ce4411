"""Generation without a cache: the whole row is computed again for every token, by the unsharded reference."""

import math
from collections.abc import Callable

import torch

from megatron_jq.architecture import Architecture
from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions
from megatron_jq.rollout.sampling import UniformStream
from tests.distributed import reference

#: A greedy choice this close to another one could fall otherwise in float32: such prompts make no test.
CLEAR = 1e-3


def generate(weights, a: Architecture, requests: list[RolloutRequest], options: SamplingOptions) -> list[Rollout]:
    """What RolloutEngine.generate promises, from its documented rules: one Rollout a slot, ln w where y* is given."""
    weights = {name: w.double() for name, w in weights.items()}
    rollouts = []
    for r in requests:
        for m in r.rationale_slots:
            if options.temperature > 0 or m == r.rationale_slots[0]:  # greedy: a prompt's rationales are alike
                choose = _greedy if options.temperature == 0 else _sampler(options, r.prompt_slot, m)
                z, num_sampled, answer, log_prob = _one(weights, a, r, options, choose)
                log_w = _log_w(weights, a, r.prompt_ids + z + r.bridge_ids, r.gold_ids) if r.gold_ids else None
            rollouts.append(Rollout(r.prompt_slot, m, z, num_sampled, answer, log_prob, log_w))
    return rollouts


def _log_w(weights, a, context, gold) -> float:
    log_p = reference.token_logits(weights, a, context + gold).log_softmax(-1)
    return sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(gold))


def _one(weights, a, request: RolloutRequest, options: SamplingOptions, choose: Callable):
    """(rationale, number sampled, answer, ln p of the sampled rationale tokens)."""
    prompt_ids, bridge_ids = request.prompt_ids, request.bridge_ids
    rationale, answer, total = [], [], 0.0
    while len(rationale) < options.rationale_budget:
        token, log_prob = choose(_next(weights, a, (*prompt_ids, *rationale)), len(rationale))
        rationale.append(token)
        total += log_prob
        if token in (options.close_id, options.eos_id):
            break
    num_sampled = len(rationale)
    if rationale[-1] != options.close_id:
        rationale.append(options.close_id)
    while len(answer) < options.answer_budget and options.eos_id not in answer:
        token, _ = choose(_next(weights, a, (*prompt_ids, *rationale, *bridge_ids, *answer)), num_sampled + len(answer))
        answer.append(token)
    return tuple(rationale), num_sampled, tuple(answer), total


def _next(weights, a, ids):
    return reference.token_logits(weights, a, ids)[-1]


def _greedy(logits_V, _draw):
    best = logits_V.topk(2).values
    assert best[0] - best[1] > CLEAR, "choose another seed: rounding decides here"
    return logits_V.argmax().item(), logits_V.log_softmax(-1).max().item()


def _sampler(options: SamplingOptions, prompt_slot: int, rationale_slot: int) -> Callable:
    stream = UniformStream(options.seed, options.step, prompt_slot, rationale_slot)

    def choose(logits_V, draw):
        log_p = reference.tempered_log_probs(logits_V[None], options.temperature, options.top_p)[0].tolist()
        uniform, mass, token = stream.at(draw), 0.0, None
        for candidate, x in enumerate(log_p):
            if x > -math.inf:
                token, mass = candidate, mass + math.exp(x)
                if uniform < mass:
                    break
        return token, log_p[token]

    return choose


def chi_square(counts: list[int], probabilities: list[float]) -> tuple[float, float]:
    """(statistic - degrees of freedom) in standard deviations, and the count outside the support. Small bins merge."""
    total = sum(counts)
    bins, rest, outside = [], [0.0, 0], 0
    for count, p in zip(counts, probabilities, strict=True):
        if p == 0.0:
            outside += count
        elif p * total >= 5:
            bins.append((count, p * total))
        else:
            rest = [rest[0] + p * total, rest[1] + count]
    if rest[0] >= 5:
        bins.append((rest[1], rest[0]))
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    degrees = len(bins) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees), outside


def draws(weights, a: Architecture, prompt_ids, temperature: float, top_p: float) -> list[float]:
    """The distribution of the first token."""
    weights = {name: w.double() for name, w in weights.items()}
    logits = reference.token_logits(weights, a, prompt_ids)[-1:]
    return torch.exp(reference.tempered_log_probs(logits, temperature, top_p))[0].tolist()
