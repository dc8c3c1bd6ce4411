"""The loss family of eq. 1-6, 15 and 17, against mpmath and closed forms."""

import math

import mpmath
import pytest
import torch

from megatron_jq.errors import UserError
from megatron_jq.objective.tsallis import (
    check_q,
    jq_loss,
    log_amplification,
    log_attenuation,
    log_mean_weight,
    log_q,
    prompt_mean_scale,
)

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEAR_ONE = (1.0 - 1e-3, 1.0 - 1e-6, 1.0 - 1e-9, 1.0 - 1e-12, math.nextafter(1.0, 0.0))
LOG_US = (-1000.0, -200.0, -50.0, -5.0, -1.0, -1e-3, -1e-12, 0.0)


def exact_log_q(log_u: float, q: float) -> mpmath.mpf:
    with mpmath.workdps(60):
        exponent = mpmath.mpf(1) - mpmath.mpf(q)
        if exponent == 0:
            return mpmath.mpf(log_u)
        return (mpmath.exp(exponent * mpmath.mpf(log_u)) - 1) / exponent


@pytest.mark.parametrize("q", QS + NEAR_ONE)
def test_log_q_agrees_with_sixty_digits_from_minus_1000_to_0_and_up_to_q_1(q):
    got = log_q(torch.tensor(LOG_US, dtype=torch.float64), q)
    for log_u, value in zip(LOG_US, got.tolist(), strict=True):
        assert value == pytest.approx(float(exact_log_q(log_u, q)), rel=4e-15, abs=0.0)


def test_log_q_at_one_is_exactly_the_logarithm_and_the_limit_from_below():
    log_u = torch.tensor(LOG_US, dtype=torch.float64)
    assert torch.equal(log_q(log_u, 1.0), log_u)
    torch.testing.assert_close(log_q(log_u, math.nextafter(1.0, 0.0)), log_u, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("q", QS[:-1])
def test_log_q_of_zero_is_the_pole_value(q):
    assert log_q(float("-inf"), q).item() == -1.0 / (1.0 - q)
    assert log_q(float("-inf"), 1.0).item() == float("-inf")


@pytest.mark.parametrize("q", QS + NEAR_ONE)
def test_gradient_of_log_q_is_u_to_the_1_minus_q_where_expm1_of_torch_would_give_zero(q):
    log_u = torch.tensor(LOG_US, dtype=torch.float64, requires_grad=True)
    log_q(log_u, q).sum().backward()
    expected = [math.exp((1.0 - q) * x) for x in LOG_US]
    torch.testing.assert_close(log_u.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0)
    assert log_u.grad[2] > 0.0  # ln u = -50: e^-50 at q = 0, not 0


def test_gradient_at_u_zero_is_zero_and_not_nan_below_q_1():
    log_u = torch.tensor([float("-inf")], dtype=torch.float64, requires_grad=True)
    log_q(log_u, 0.5).sum().backward()
    assert log_u.grad.item() == 0.0


def test_float32_input_is_computed_in_float64():
    assert log_q(torch.tensor(-50.0), 0.9).dtype == torch.float64
    assert log_mean_weight(torch.tensor([[-50.0, -60.0]])).dtype == torch.float64


@pytest.mark.parametrize("p", (0.9, 0.5, 1e-3, 1e-30))
def test_the_poles_are_1_minus_p_and_minus_log_p(p):
    assert jq_loss(math.log(p), 0.0).item() == pytest.approx(1.0 - p, rel=1e-14)
    assert jq_loss(math.log(p), 1.0).item() == -math.log(p)


@pytest.mark.parametrize("q", QS)
def test_loss_gradient_is_p_to_minus_q_times_rl_and_p_to_1_minus_q_times_likelihood(q):
    logits = torch.tensor([-3.0, 1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, 0)[0]

    def gradient(pole: float) -> torch.Tensor:
        return torch.autograd.grad(jq_loss(log_p, pole), logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(q), log_amplification(log_p.detach(), q).exp() * gradient(0.0))
    torch.testing.assert_close(gradient(q), log_attenuation(log_p.detach(), q).exp() * gradient(1.0))
    # and against the closed form, so that the three cannot be wrong together: -P^(1-q) (onehot - softmax)
    p = torch.softmax(logits.detach(), 0)
    torch.testing.assert_close(gradient(q), -(p[0] ** (1 - q)) * (torch.eye(4, dtype=torch.float64)[0] - p))


def test_amplification_of_zero_probability_is_one_at_its_neutral_pole():
    zero = torch.tensor([float("-inf")])
    assert log_amplification(zero, 0.0).item() == 0.0 and log_attenuation(zero, 1.0).item() == 0.0
    assert log_amplification(zero, 0.5).item() == float("inf") and log_attenuation(zero, 0.5).item() == float("-inf")


@pytest.mark.parametrize("q", (0.25, 0.5, 0.75, 1.0))
def test_the_minimiser_of_a_categorical_model_is_the_escort_distribution(q):
    frequency = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    escort = frequency ** (1.0 / q) / (frequency ** (1.0 / q)).sum()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return (frequency * jq_loss(torch.log_softmax(logits, 0), q)).sum()

    logits = escort.log().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert gradient.abs().max() < 1e-14
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        nearby = escort.log() + 0.3 * torch.randn(4, generator=generator, dtype=torch.float64)
        assert loss(nearby) > loss(escort.log())


def test_at_q_0_the_loss_prefers_the_mode_alone():
    frequency = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_modes = torch.tensor([[0.0, -40.0, -40.0], [-1.0, -1.0, -1.0], [-40.0, 0.0, -40.0]], dtype=torch.float64)
    losses = (frequency * jq_loss(torch.log_softmax(log_modes, 1), 0.0)).sum(1)
    assert losses.argmin() == 0 and losses[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("q", (0.25, 0.5, 0.75, 1.0))
def test_noise_equilibrium_is_the_flip_odds_to_the_power_1_over_q(q):
    flip = 0.01
    odds = (flip / (1.0 - flip)) ** (1.0 / q)
    logit = torch.tensor(math.log(odds), dtype=torch.float64, requires_grad=True)
    log_wrong, log_right = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
    loss = flip * jq_loss(log_wrong, q) + (1.0 - flip) * jq_loss(log_right, q)
    (gradient,) = torch.autograd.grad(loss, logit)
    assert abs(gradient.item()) < 1e-15  # eq. 17: the wrong label's odds at rest


@pytest.mark.parametrize("q", QS)
def test_jensen_bounds_the_mean_loss_by_the_loss_of_the_mean(q):
    p = torch.rand(20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean_loss, loss_of_mean = jq_loss(p.log(), q).mean(1), jq_loss(p.mean(1).log(), q)
    if q == 0.0:
        torch.testing.assert_close(mean_loss, loss_of_mean)  # linear in P: equality throughout
    else:
        assert (mean_loss > loss_of_mean).all()
    equal = torch.full((1, 8), 0.37, dtype=torch.float64)
    torch.testing.assert_close(jq_loss(equal.log(), q).mean(1), jq_loss(equal.mean(1).log(), q))


@pytest.mark.parametrize("q", QS)
def test_gradient_flow_speed_is_p_to_2_minus_q_times_the_squared_score(q):
    logits = torch.tensor([-2.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, 0)[0]
    (score,) = torch.autograd.grad(log_p, logits, retain_graph=True)
    (loss_gradient,) = torch.autograd.grad(jq_loss(log_p, q), logits)
    p = log_p.exp().item()
    speed = -(p * score * loss_gradient).sum().item()  # dp/dt = <grad p, -grad l_q>, eq. 6
    assert speed == pytest.approx(p ** (2.0 - q) * score.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("q", QS)
def test_escape_time_of_the_sigmoid_model_is_the_integral_of_eq_15(q):
    start, end = 1e-4, 0.5
    theta = torch.linspace(math.log(start / (1 - start)), math.log(end / (1 - end)), 4001, dtype=torch.float64)
    theta.requires_grad_()
    (slope,) = torch.autograd.grad(jq_loss(torch.nn.functional.logsigmoid(theta), q).sum(), theta)
    rate = 1.0 / -slope  # dt = dθ / (-dl/dθ), by Simpson's rule
    step = (theta[1] - theta[0]).item()
    simpson = step / 3 * (rate[0] + rate[-1] + 4 * rate[1:-1:2].sum() + 2 * rate[2:-1:2].sum())
    expected = mpmath.quad(lambda u: 1 / (u ** (2 - q) * (1 - u) ** 2), [start, 1e-3, 1e-2, 0.1, end])
    assert simpson.item() == pytest.approx(float(expected), rel=1e-8)


def test_log_mean_weight_agrees_with_sixty_digits_and_ignores_masked_entries():
    log_w = torch.tensor([[-1000.0, -1001.0, float("nan")], [-5.0, -900.0, -7.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    with mpmath.workdps(60):
        first = mpmath.log((mpmath.exp(-1000) + mpmath.exp(-1001)) / 2)
        second = mpmath.log((mpmath.exp(-5) + mpmath.exp(-900) + mpmath.exp(-7)) / 3)
    expected = torch.tensor([float(first), float(second)], dtype=torch.float64)
    torch.testing.assert_close(log_mean_weight(log_w, valid), expected, rtol=1e-15, atol=0.0)


def test_log_mean_weight_is_minus_infinity_without_mass_and_nan_without_rationales():
    empty = torch.full((2, 2), float("-inf"))
    value = log_mean_weight(empty, torch.tensor([[True, True], [False, False]]))
    assert value[0] == float("-inf") and torch.isnan(value[1])


def test_prompt_mean_scale_counts_only_the_prompts_and_rationales_that_are_left():
    valid = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False], [False] * 4])
    expected = torch.tensor([1 / (2 * 4), 1 / (2 * 2), 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(prompt_mean_scale(valid, 2), expected)
    expected = torch.tensor([1 / (3 * 4), 1 / (3 * 2), 1 / 3, 0.0], dtype=torch.float64)
    assert torch.equal(prompt_mean_scale(valid, 1), expected)
    expected = torch.tensor([1 / 15, 1 / 15, 1 / 15, 0.0], dtype=torch.float64)
    assert torch.equal(prompt_mean_scale(valid, 1, num_resamples=5), expected)


def test_prompt_mean_scale_is_zero_and_finite_when_no_prompt_is_left():
    assert torch.equal(prompt_mean_scale(torch.zeros(3, 4, dtype=torch.bool), 2), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("q", (-0.1, 1.0 + 1e-9, 2.0, float("nan")))
def test_q_outside_0_1_is_refused(q):
    with pytest.raises(UserError, match="0, 1"):
        check_q(q)
    with pytest.raises(UserError, match="0, 1"):
        log_q(-1.0, q)
