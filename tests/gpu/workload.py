"""What the tests of the CUDA path run, on whatever device the runtime has, with results on the host."""

from dataclasses import dataclass, replace

import torch

from megatron_jq.model.build import build_policies, wrap_for_training
from megatron_jq.parallel.logprob import linear_log_probs
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.parallel.weighted_logprob import weighted_log_probs
from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.passes import BatchOptions
from tests.distributed import reference
from tests.distributed.cases import SMALL, batch, build_options, score_and_train, share
from tests.distributed.shards import load_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GREEDY = SamplingOptions(9, 4, 0.0, 1.0, close_id=3, eos_id=4, seed=0, step=0)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9)
#: Ragged prompts: two of one length, so that rows share a product and seats stay empty.
REQUESTS = [
    RolloutRequest(b, tuple(range(5, 5 + length)), tuple(range(b + 1)), gold_ids=(7, 8, 69)[: b + 1])
    for b, length in enumerate((3, 3, 7))
]
LAYOUTS = {
    "shared prompts": BatchOptions(micro_batch_size=4),
    "each by itself": BatchOptions(micro_batch_size=4, share_prompts=False),
}


@dataclass(frozen=True)
class Step:
    """Of one scoring and training pass. gradients: by parameter, float32."""

    log_z_BM: torch.Tensor
    log_w_BM: torch.Tensor
    gradients: dict[str, torch.Tensor]


def policy_on(runtime: Runtime, dtype: str = "float32", *, sequence_parallel: bool = False, architecture=SMALL):
    """(policy, model wrapped for training) with the tests' weights, rounded to dtype."""
    options = build_options(architecture, params_dtype=DTYPES[dtype], sequence_parallel=sequence_parallel)
    [policy] = build_policies(architecture, options, runtime)
    load_whole(policy, runtime, reference.noisy_weights(architecture))
    return policy, wrap_for_training([policy], options, runtime)


def one_step(runtime: Runtime, policy, model, estimator: str, options: BatchOptions) -> Step:
    done = score_and_train(runtime, policy, model, share(batch(), runtime), options, estimator)
    scores = done.scores
    gradients = {name: gradient.cpu() for name, gradient in done.gradients[1].items()}
    return Step(scores.table.log_z_BM, scores.table.log_w_BM, gradients)


def steps(
    runtime: Runtime, dtype: str, *, estimators=("garl", "paft"), sequence_parallel: bool = False
) -> dict[tuple[str, str], Step]:
    """By estimator and layout of the rows."""
    policy, model = policy_on(runtime, dtype, sequence_parallel=sequence_parallel)
    return {
        (estimator, name): one_step(runtime, policy, model, estimator, options)
        for estimator in estimators
        for name, options in LAYOUTS.items()
    }


def greedy(runtime: Runtime) -> list[Rollout]:
    policy, _ = policy_on(runtime)
    return MegatronEngine([policy], runtime).generate(REQUESTS, GREEDY)


def sampled(runtime: Runtime) -> list[Rollout]:
    policy, _ = policy_on(runtime)
    return MegatronEngine([policy], runtime, max_rows=4).generate(REQUESTS, SAMPLED)


def head(runtime: Runtime, dtype: str) -> dict[str, list[torch.Tensor]]:
    """[value, gradient of the states, gradient of the weight] of the head's functions."""
    g = torch.Generator().manual_seed(2)
    tokens, hidden_size, vocab, padded = 50, 32, 301, 304
    hidden, weight = (torch.randn(n, hidden_size, generator=g).to(DTYPES[dtype]) for n in (tokens, padded))
    targets = torch.randint(vocab, (tokens,), generator=g)
    coefficient = torch.randn(tokens, generator=g, dtype=torch.float64)
    inverse = torch.where(torch.arange(tokens) % 2 == 0, 1.0, 1.5)
    top_p = torch.where(torch.arange(tokens) % 3 == 0, 1.0, 0.9)
    hidden, weight, targets, coefficient, inverse, top_p = (
        x.to(runtime.device) for x in (hidden, weight, targets, coefficient, inverse, top_p)
    )
    options = {"chunk_tokens": 16, "vocab_size": vocab}
    tempered = {**options, "inverse_temperature_T": inverse}

    def differentiated(loss_of) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = loss_of(*leaves)
        return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, leaves))]

    return {
        "training": differentiated(lambda h, w: weighted_log_probs(h, w, targets, coefficient, None, **tempered)[0]),
        "scoring": differentiated(lambda h, w: (coefficient * linear_log_probs(h, w, targets, None, **options)).sum()),
        "nucleus": differentiated(
            lambda h, w: (coefficient * linear_log_probs(h, w, targets, None, top_p_T=top_p, **options)).sum()
        ),
    }


def same_rollouts(found: list[Rollout], expected: list[Rollout], tolerance: float) -> None:
    """Token for token; log-probabilities within the tolerance, in nats."""
    bare = [[replace(r, log_prob=0.0, log_w=None) for r in rollouts] for rollouts in (found, expected)]
    assert bare[0] == bare[1]
    for figure in ("log_prob", "log_w"):
        pairs = zip(*([getattr(r, figure) for r in rollouts] for rollouts in (found, expected)), strict=True)
        assert max(abs(a - b) for a, b in pairs) < tolerance, figure


def same_step(found: Step, expected: Step, tolerance: float) -> None:
    """Log-likelihoods in nats; gradients by the norm of their difference, against that of the largest."""
    for name in ("log_z_BM", "log_w_BM"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=10 * tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(gradient.norm() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() < tolerance * largest, name
