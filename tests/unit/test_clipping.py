"""GRPO's loss a token: values by hand, coefficients by autograd, and the training head that asks for them."""

import math

import pytest
import torch

from megatron_jq.config import parse_args
from megatron_jq.config_validate import validate_training
from megatron_jq.errors import UserError
from megatron_jq.objective.clipping import (
    TokenFigures,
    TokenRule,
    clipped_coefficients,
    clipped_surrogate,
    clipped_tokens,
    reference_kl,
    reference_kl_coefficients,
)
from megatron_jq.parallel.weighted_logprob import log_probs_as_trained, weighted_log_probs
from megatron_jq.train.estimators import Estimator

BOUNDS = (0.2, 0.3)


def tokens(count: int = 400, spread: float = 0.5):
    """(ln p, old, reference, advantage of both signs and zero), float64."""
    generator = torch.Generator().manual_seed(4)
    log_prob, old, reference, advantage = torch.randn(4, count, dtype=torch.float64, generator=generator) * spread
    advantage[::7] = 0.0
    return log_prob - 2, old - 2, reference - 2, advantage


def derivative(value_of, log_prob):
    leaf = log_prob.clone().requires_grad_()
    [gradient] = torch.autograd.grad(value_of(leaf).sum(), leaf)
    return gradient


def test_coefficients_are_the_derivatives_of_the_values():
    log_prob, old, reference, advantage = tokens()
    flat = clipped_tokens(log_prob, old, advantage, *BOUNDS)
    assert 40 < flat.sum() < 300 and (advantage[flat] > 0).any() and (advantage[flat] < 0).any()
    expected = derivative(lambda x: clipped_surrogate(x, old, advantage, *BOUNDS), log_prob)
    torch.testing.assert_close(clipped_coefficients(log_prob, old, advantage, *BOUNDS), expected, rtol=1e-14, atol=0)
    assert torch.equal(flat, (expected == 0) & (advantage != 0))
    expected = derivative(lambda x: reference_kl(x, reference), log_prob)
    torch.testing.assert_close(reference_kl_coefficients(log_prob, reference), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "coefficient"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.25, 2.0, 2.5, 2.5),
        (1.5, 2.0, 2.6, 0.0),  # up to 1 + 0.3
        (0.5, 2.0, 1.0, 1.0),  # a good token that became rarer is not held back
        (0.9, -2.0, -1.8, -1.8),
        (0.5, -2.0, -1.6, 0.0),  # down to 1 - 0.2
        (3.0, -2.0, -6.0, -6.0),  # a bad token that became likelier is not let off
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_ratio_counts_up_to_the_bound_on_the_side_that_the_advantage_favours(ratio, advantage, value, coefficient):
    log_prob, old, a = (torch.tensor([x], dtype=torch.float64) for x in (math.log(ratio) - 1, -1.0, advantage))
    assert clipped_surrogate(log_prob, old, a, *BOUNDS).item() == pytest.approx(value)
    assert clipped_coefficients(log_prob, old, a, *BOUNDS).item() == pytest.approx(coefficient)


def test_the_kl_estimate_is_the_kl_in_expectation_and_never_negative():
    p, q = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    estimate = reference_kl(p, q)
    assert (estimate >= 0).all()
    assert (p.exp() * estimate).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-12)
    assert (reference_kl(p, p) == 0).all() and (reference_kl_coefficients(p, p) == 0).all()
    tiny = reference_kl(p, p + 1e-9)  # exp(d) - d - 1 by plain subtraction would be 0 or 2e-16 here
    torch.testing.assert_close(tiny, torch.full_like(p, 5e-19), rtol=1e-5, atol=0)


def test_a_rules_coefficients_are_the_derivative_of_its_loss():
    log_prob, old, reference, advantage = tokens()
    weight = torch.rand(len(old), dtype=torch.float64)
    both = TokenRule(*BOUNDS, old, reference, weight)
    for rule in (both, TokenRule(*BOUNDS, old), TokenRule(*BOUNDS, None, reference, weight), TokenRule(*BOUNDS)):
        expected = derivative(lambda x, rule=rule: rule.loss(-advantage, x), log_prob)
        torch.testing.assert_close(rule.coefficients(-advantage, log_prob), expected, rtol=1e-13, atol=1e-15)
    by_hand = -clipped_surrogate(log_prob, old, advantage, *BOUNDS) + weight * reference_kl(log_prob, reference)
    assert both.loss(-advantage, log_prob).item() == pytest.approx(by_hand.sum().item(), rel=1e-12)
    halves = [both.part(half).loss(-advantage[half], log_prob[half]) for half in (slice(0, 99), slice(99, None))]
    assert sum(halves).item() == pytest.approx(by_hand.sum().item(), rel=1e-12)


def test_on_the_policy_that_sampled_the_coefficients_are_the_constants_bit_for_bit():
    double, _, _, advantage = tokens()
    for log_prob in (double, double.float()):
        weight = torch.ones_like(advantage)
        for rule in (TokenRule(*BOUNDS), TokenRule(*BOUNDS, log_prob), TokenRule(*BOUNDS, log_prob, log_prob, weight)):
            assert torch.equal(rule.coefficients(-advantage, log_prob), -advantage)


def test_figures_count_tokens_with_an_advantage_and_tokens_that_the_penalty_weighs():
    log_prob, old, reference, advantage = tokens()
    weight = torch.rand(len(old), dtype=torch.float64)
    weight[::3] = 0.0
    actual = TokenFigures(*TokenRule(*BOUNDS, old, reference, weight).figures(-advantage, log_prob).tolist())
    kl = reference_kl(log_prob, reference)
    flat = clipped_tokens(log_prob, old, advantage, *BOUNDS)
    assert actual.clipped_fraction == pytest.approx(flat[advantage != 0].double().mean().item())
    assert actual.kl_mean == pytest.approx(kl[weight > 0].mean().item())
    assert actual.kl_loss == pytest.approx((weight * kl).sum().item())
    nothing = TokenFigures(*TokenRule(*BOUNDS).figures(torch.empty(0), torch.empty(0)).tolist())
    assert (nothing.clipped_fraction, nothing.kl_mean, nothing.kl_loss) == (0, 0, 0)


T, H, V, PADDED = 11, 6, 37, 48


@pytest.fixture
def layer():
    """(hidden, weight with loud padding rows, targets, coefficients, rule with some tokens clipped), float64."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(PADDED, H, generator=g, dtype=torch.float64)
    weight[V:] = 50.0
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64)
    targets, coefficients = torch.randint(V, (T,), generator=g), torch.randn(T, generator=g, dtype=torch.float64)
    log_prob = torch.log_softmax(hidden @ weight[:V].t(), dim=-1)[torch.arange(T), targets]
    old, reference = log_prob + 0.5 * torch.randn(2, T, generator=g, dtype=torch.float64)
    rule = TokenRule(*BOUNDS, old, reference, torch.rand(T, generator=g, dtype=torch.float64))
    assert 0 < clipped_tokens(log_prob, old, -coefficients, *BOUNDS).sum() < T
    return hidden, weight, targets, coefficients, rule


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("tempered", [False, True])
def test_the_training_heads_gradient_is_that_of_the_rules_loss(layer, chunk, tempered):
    hidden, weight, targets, coefficients, rule = layer
    inverse = torch.where(torch.arange(T) % 2 == 0, 1.0, 1.5).double() if tempered else None
    options = {"chunk_tokens": chunk, "vocab_size": V, "inverse_temperature_T": inverse, "rule": rule}

    def head(hidden, weight):
        return weighted_log_probs(hidden, weight, targets, coefficients, None, **options)[0]

    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(head, (hidden, weight))
    scale = 1.0 if inverse is None else inverse[:, None]
    log_prob = torch.log_softmax(hidden @ weight[:V].t() * scale, dim=-1)[torch.arange(T), targets]
    expected = rule.loss(coefficients, log_prob)
    torch.testing.assert_close(head(hidden, weight), expected, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(x, (hidden, weight)) for x in (head(hidden, weight), expected))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_with_a_rule_too_the_weights_gradient_goes_to_main_grad(layer):
    hidden, weight, targets, coefficients, rule = layer
    plain, fused = (weight.clone().requires_grad_() for _ in range(2))
    fused.main_grad = torch.full_like(fused, 0.25)
    for w in (plain, fused):
        weighted_log_probs(hidden, w, targets, coefficients, None, chunk_tokens=4, vocab_size=V, rule=rule)[
            0
        ].backward()
    assert fused.grad is None and plain.grad.norm() > 0.1
    torch.testing.assert_close(fused.main_grad - 0.25, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_log_probs_without_gradient_are_the_training_heads_bit_for_bit(dtype, count):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, 64, generator=generator).to(dtype)
    weight = torch.randn(500, 64, generator=generator).to(dtype)
    targets = torch.randint(490, (count,), generator=generator)
    options = {"chunk_tokens": 16, "vocab_size": 490, "inverse_temperature_T": torch.full((count,), 1.25)}
    actual = log_probs_as_trained(hidden, weight, targets, None, **options)
    trained = weighted_log_probs(hidden, weight, targets, torch.ones(count).double(), None, **options)[1]
    assert torch.equal(actual, trained) and actual.dtype == torch.float32 and len(actual) == count


def test_the_penalty_weighs_every_sequence_of_the_batch_alike():
    valid = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    weight = Estimator("grpo", 3, normalize=True, seed=0).kl_weights(valid, 0.05)
    expected = [[0.05 / 4, 0.05 / 4, 0], [0, 0, 0], [0.05 / 6] * 3]  # the second prompt leaves the batch: B = 2
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def problems(flags: str) -> str:
    with pytest.raises(UserError) as refused:
        validate_training(parse_args(flags.split()), 1)
    return str(refused.value)


@pytest.mark.parametrize("estimator", ["garl", "rloo", "maxrl", "verifree"])
@pytest.mark.parametrize(
    "flags", ["--grpo-iterations 2", "--grpo-kl-beta 0.1", "--grpo-clamp-eps-lower 0.1", "--grpo-clamp-eps-upper 0.3"]
)
def test_other_estimators_refuse_grpos_flags(estimator, flags):
    name = {"verifree": "garl"}.get(estimator, estimator)
    expected = f"{flags.split()[0]} is for --estimator grpo alone, not {name}"
    assert problems(f"--estimator {estimator} {flags}") == expected
    validate_training(parse_args(f"--estimator grpo {flags}".split()), 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--grpo-iterations 0", "--grpo-iterations must be at least 1"),
        ("--grpo-clamp-eps-lower 1.5", "--grpo-clamp-eps-lower must lie between 0 and 1"),
        ("--grpo-clamp-eps-upper -0.1", "--grpo-clamp-eps-upper must be at least 0"),
        ("--grpo-kl-beta -1", "--grpo-kl-beta must be at least 0"),
        ("--grpo-kl-beta nan", "--grpo-kl-beta must be finite"),
        ("--grpo-kl-beta 0.1 --top-p 0.9", "need --top-p 1"),
        ("--grpo-iterations 2 --top-p 0.9", "need --top-p 1"),
    ],
)
def test_settings_without_meaning_are_refused_in_one_line(flags, words):
    actual = problems(f"--estimator grpo {flags}")
    assert words in actual and len(actual.splitlines()) == 1
