"""GARL and PAFT against brute-force enumeration, on a tiny categorical model: z ~ softmax(theta), y ~ softmax(phi[z]).

Every pool of M rationales is enumerated with its probability, so expectations are sums, not samples. The references
are written in plain Python from the paper's equations, with hand-derived gradients; the code under test goes through
autograd of its surrogate loss.
"""

import itertools
import math

import pytest
import torch

from megatron_jq.objective.garl import garl_coefficients, garl_plug_in_coefficients
from megatron_jq.objective.paft import paft_attenuation
from megatron_jq.objective.tsallis import jq_loss, log_mean_weight

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
THETA = (0.3, -0.4, 0.9, -1.1)
PHI = ((-2.0, 0.4, 0.1), (0.5, -0.3, 0.2), (-1.0, 0.8, 1.1), (1.5, 0.0, -0.7))  # y* is answer 0


def softmax(logits: tuple[float, ...]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


class Toy:
    """The model in torch: log-probabilities of z and of y* given z as functions of flat parameters [R + R*A]."""

    def __init__(self, num_rationales: int = 4):
        flat = [*THETA[:num_rationales], *itertools.chain(*PHI[:num_rationales])]
        self.size = num_rationales
        self.parameters = torch.tensor(flat, dtype=torch.float64, requires_grad=True)

    def log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        theta, phi = self.parameters[: self.size], self.parameters[self.size :].view(self.size, -1)
        return torch.log_softmax(theta, 0), torch.log_softmax(phi, 1)[:, 0]

    def pools(self, num_draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All pools [T, M] of rationale indices and their probabilities [T]."""
        pool_TM = torch.tensor(list(itertools.product(range(self.size), repeat=num_draws)))
        log_prior, _ = self.log_probs()
        return pool_TM, log_prior.detach()[pool_TM].sum(1).exp()

    def log_weights(self, pool_TM: torch.Tensor) -> torch.Tensor:
        return self.log_probs()[1].detach()[pool_TM]

    def surrogate_gradient(self, pool_TM, chance_T, rationale_TM, answer_TM, inner: float) -> torch.Tensor:
        """Gradient of sum_T chance · -(1/inner) sum_m [rationale · ln p(z) + answer · ln p(y*|z)]."""
        log_prior, log_answer = self.log_probs()
        per_pool = (rationale_TM * log_prior[pool_TM] + answer_TM * log_answer[pool_TM]).sum(1) / inner
        return torch.autograd.grad(-(chance_T * per_pool).sum(), self.parameters)[0]

    def exact_gradient(self, q: float) -> torch.Tensor:
        """grad l_q by hand: -P^-q grad P, with dP/dtheta_k = p_k (w_k - P) and dP/dphi_ka = p_k w_k (1[a=0] - s_ka)."""
        prior = softmax(THETA[: self.size])
        answers = [softmax(row) for row in PHI[: self.size]]
        success = sum(p * s[0] for p, s in zip(prior, answers, strict=True))
        gradient = [p * (s[0] - success) for p, s in zip(prior, answers, strict=True)]
        for p, s in zip(prior, answers, strict=True):
            gradient += [p * s[0] * ((a == 0) - s[a]) for a in range(len(s))]
        return torch.tensor([-(success**-q) * g for g in gradient], dtype=torch.float64)


def equation_12(q: float, num_draws: int, *, baseline: bool, normalize: bool) -> torch.Tensor:
    """E[g] of eq. 12, pool by pool, in Python floats and with hand-derived scores."""
    prior = softmax(THETA)
    answers = [softmax(row) for row in PHI]
    total = [0.0] * (4 + 12)
    for pool in itertools.product(range(4), repeat=num_draws):
        chance = math.prod(prior[z] for z in pool)
        weights = [answers[z][0] for z in pool]
        mean = sum(weights) / num_draws
        for m, z in enumerate(pool):
            others = weights[:m] + weights[m + 1 :]
            c = weights[m] / mean**q - (sum(others) / len(others)) ** (1 - q) * baseline
            for k in range(4):
                total[k] += chance * -c * ((k == z) - prior[k]) / num_draws
            for a in range(3):
                grad_w = weights[m] * ((a == 0) - answers[z][a])
                total[4 + 3 * z + a] += chance * -grad_w / mean**q / num_draws
    return torch.tensor(total, dtype=torch.float64) / (num_draws**q if normalize else 1.0)


def garl_expectation(toy: Toy, q: float, num_draws: int, *, normalize: bool = False) -> torch.Tensor:
    pool, chance = toy.pools(num_draws)
    rationale, answer = garl_coefficients(toy.log_weights(pool), q, normalize=normalize)
    return toy.surrogate_gradient(pool, chance, rationale, answer, num_draws)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("num_draws", (2, 3))
@pytest.mark.parametrize("q", QS)
def test_expected_garl_gradient_equals_a_direct_evaluation_of_eq_12(q, num_draws, normalize):
    expected = equation_12(q, num_draws, baseline=True, normalize=normalize)
    got = garl_expectation(Toy(), q, num_draws, normalize=normalize)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_draws", (2, 3, 4, 5))
def test_at_q_0_the_expected_gradient_is_exactly_that_of_1_minus_p(num_draws):
    toy = Toy()
    torch.testing.assert_close(garl_expectation(toy, 0.0, num_draws), toy.exact_gradient(0.0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_draws", (2, 3))
@pytest.mark.parametrize("q", QS)
def test_the_leave_one_out_baseline_leaves_the_expectation_unchanged_and_changes_the_draws(q, num_draws):
    toy = Toy()
    pool, chance = toy.pools(num_draws)
    log_w = toy.log_weights(pool)
    plug_in = garl_plug_in_coefficients(log_w, q, normalize=False)
    without = toy.surrogate_gradient(pool, chance, plug_in, plug_in, num_draws)
    torch.testing.assert_close(garl_expectation(toy, q, num_draws), without, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        without, equation_12(q, num_draws, baseline=False, normalize=False), rtol=1e-12, atol=1e-15
    )
    assert not torch.allclose(garl_coefficients(log_w, q, normalize=False)[0], plug_in)  # not true by being absent


@pytest.mark.parametrize("q", (0.25, 0.5, 0.75, 1.0))
def test_the_bias_falls_as_one_over_m_by_full_enumeration(q):
    toy = Toy(num_rationales=3)
    exact = toy.exact_gradient(q)
    bias = [(garl_expectation(toy, q, m) - exact).norm().item() for m in (2, 3, 4, 5, 6)]
    assert all(later < earlier for earlier, later in itertools.pairwise(bias))
    scaled = [m * b for m, b in zip((2, 3, 4, 5, 6), bias, strict=True)]
    # M · bias settles, where a bias without the 1/M would make it grow threefold
    assert max(scaled) / min(scaled) < 1.5 and scaled[-1] / scaled[-2] == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("q", (0.25, 0.5, 0.75, 1.0))
def test_the_bias_halves_when_m_doubles_in_the_limit(q):
    # Two kinds of rationale: a pool is known by how many of the first kind it holds, so M = 128 can be enumerated.
    toy = Toy(num_rationales=2)
    exact, prior = toy.exact_gradient(q), softmax(THETA[:2])
    bias = {}
    for num_draws in (64, 128):
        first = torch.arange(num_draws + 1)
        pool = (torch.arange(num_draws)[None, :] >= first[:, None]).long()
        chance = torch.tensor(
            [math.comb(num_draws, n) * prior[0] ** n * prior[1] ** (num_draws - n) for n in first.tolist()],
            dtype=torch.float64,
        )
        rationale, answer = garl_coefficients(toy.log_weights(pool), q, normalize=False)
        bias[num_draws] = (toy.surrogate_gradient(pool, chance, rationale, answer, num_draws) - exact).norm().item()
    assert bias[64] / bias[128] == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize("q", QS)
def test_the_plug_in_is_the_gradient_of_the_loss_of_the_importance_weighted_mean(q):
    """With z drawn from mu and held fixed, grad l_q(mean of p(z,y*)/mu(z)) is the plug-in; at q = 1 this is IWAE."""
    toy = Toy()
    pool = torch.tensor([[0, 3, 3, 1], [2, 2, 1, 0], [1, 1, 1, 1]])
    log_prior, log_answer = toy.log_probs()
    log_ratio = (log_prior + log_answer)[pool] - log_prior.detach()[pool]
    (expected,) = torch.autograd.grad(jq_loss(log_mean_weight(log_ratio), q).sum(), toy.parameters)
    plug_in = garl_plug_in_coefficients(toy.log_weights(pool), q, normalize=False)
    got = toy.surrogate_gradient(pool, 1.0, plug_in, plug_in, 4)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("q", (0.0, 0.5, 1.0))
def test_with_a_proposal_the_ratio_multiplies_w_and_q_0_stays_unbiased(q):
    """z ~ mu, ln w := ln p(y*|z) + ln p(z) - ln mu(z)."""
    toy = Toy()
    log_mu = torch.log_softmax(torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64), 0)
    pool, _ = toy.pools(3)
    chance = log_mu[pool].sum(1).exp()
    log_prior, log_answer = (x.detach() for x in toy.log_probs())
    log_w = (log_answer + log_prior - log_mu)[pool]
    plug_in = garl_plug_in_coefficients(log_w, q, normalize=False)
    got = toy.surrogate_gradient(pool, chance, plug_in, plug_in, 3)
    distance = (got - toy.exact_gradient(q)).norm() / toy.exact_gradient(q).norm()
    assert distance < 1e-12 if q == 0.0 else 1e-3 < distance < 0.5


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("num_resamples", (1, 2, 3))
@pytest.mark.parametrize("q", QS)
def test_given_the_pool_expected_paft_is_garls_plug_in(q, num_resamples, normalize):
    toy = Toy()
    for pool in ((0, 3, 1), (2, 2, 1), (0, 0, 0)):
        pool_1M = torch.tensor([pool])
        log_w = toy.log_weights(pool_1M)
        weights = [softmax(PHI[z])[0] for z in pool]
        attenuation = paft_attenuation(log_w, q, normalize=normalize)
        expected = torch.zeros_like(toy.parameters)
        for draw in itertools.product(range(3), repeat=num_resamples):
            chance = math.prod(weights[r] / sum(weights) for r in draw)
            counts = torch.bincount(torch.tensor(draw), minlength=3).double()[None]
            joint = attenuation[:, None] * counts
            expected += toy.surrogate_gradient(pool_1M, chance, joint, joint, num_resamples)
        plug_in = garl_plug_in_coefficients(log_w, q, normalize=normalize)
        got = toy.surrogate_gradient(pool_1M, 1.0, plug_in, plug_in, 3)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
        # and Prop. D.3 as printed: g_M / w̄^q, with g_M the q = 0 gradient of the same pool
        unweighted = garl_plug_in_coefficients(log_w, 0.0)
        g_pool = toy.surrogate_gradient(pool_1M, 1.0, unweighted, unweighted, 3)
        mean = sum(weights) / 3
        torch.testing.assert_close(got, g_pool / mean**q / (3**q if normalize else 1.0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("q", (0.25, 0.75, 1.0))
def test_garl_has_the_lower_variance_of_the_two(q):
    """Prop. D.4 on the toy: total variance over pools (and over draws, K = M = 2), trace of the covariance."""
    toy = Toy()
    pools, chances = toy.pools(2)
    one = torch.ones(1, dtype=torch.float64)
    means, squares = {"garl": 0.0, "paft": 0.0}, {"garl": 0.0, "paft": 0.0}
    for pool, chance in zip(pools, chances, strict=True):
        log_w = toy.log_weights(pool[None])
        rationale, answer = garl_coefficients(log_w, q, normalize=False)
        outcomes = [("garl", chance, rationale, answer)]
        share = torch.softmax(log_w[0], 0)
        for draw in itertools.product(range(2), repeat=2):
            counts = torch.bincount(torch.tensor(draw), minlength=2).double()[None]
            joint = paft_attenuation(log_w, q, normalize=False)[:, None] * counts
            outcomes.append(("paft", chance * share[list(draw)].prod(), joint, joint))
        for name, weight, first, second in outcomes:
            gradient = toy.surrogate_gradient(pool[None], one, first, second, 2)
            means[name] = means[name] + weight * gradient
            squares[name] = squares[name] + weight * gradient.square().sum()
    torch.testing.assert_close(means["garl"], means["paft"], rtol=1e-12, atol=1e-15)
    variance = {name: (squares[name] - means[name].square().sum()).item() for name in means}
    assert 0.0 < variance["garl"] < variance["paft"]
