"""RLOO, GRPO, MaxRL and SFT as coefficients, against the statistics module, enumeration and the papers' examples."""

import itertools
import math
import statistics

import pytest
import torch

from megatron_jq.objective.baselines import (
    grpo_coefficients,
    maxrl_coefficients,
    rloo_coefficients,
    sft_coefficients,
    star_coefficients,
)
from megatron_jq.objective.garl import garl_coefficients
from megatron_jq.objective.paft import paft_coefficients

ESTIMATORS = (rloo_coefficients, grpo_coefficients, maxrl_coefficients)


def both_equal(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One advantage weighs rationale and sampled answer alike."""
    torch.testing.assert_close(*pair, rtol=0.0, atol=0.0, equal_nan=True)
    assert pair[0].dtype == torch.float64
    return pair[0]


def test_rloo_subtracts_the_mean_of_the_others():
    reward = [0.0, 1.0, 0.25, 1.0, 0.5]
    expected = [r - statistics.fmean(reward[:m] + reward[m + 1 :]) for m, r in enumerate(reward)]
    got = both_equal(rloo_coefficients(torch.tensor([reward])))
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64))


def test_rloo_is_unbiased_for_the_gradient_of_the_expected_reward():
    logits = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reward_of = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    draws = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_p = torch.log_softmax(logits, 0)
    chance = log_p.detach()[draws].sum(1).exp()
    advantage = both_equal(rloo_coefficients(reward_of[draws]))
    loss = -(chance * (advantage * log_p[draws]).mean(1)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    p = torch.softmax(logits.detach(), 0)
    expected = -p * (reward_of - (p * reward_of).sum())
    torch.testing.assert_close(gradient, expected)


def test_grpo_divides_by_the_sample_standard_deviation():
    reward = [0.0, 1.0, 0.25, 1.0, 0.5]
    mean, deviation = statistics.fmean(reward), statistics.stdev(reward)
    got = both_equal(grpo_coefficients(torch.tensor([reward])))
    torch.testing.assert_close(got, torch.tensor([[(r - mean) / deviation for r in reward]], dtype=torch.float64))


def test_grpo_of_one_success_in_m_has_the_closed_form():
    reward = torch.zeros(1, 32)
    reward[0, 5] = 1.0
    got = both_equal(grpo_coefficients(reward))
    assert got[0, 5].item() == pytest.approx(31 / math.sqrt(32), rel=1e-12)
    assert got[0, 0].item() == pytest.approx(-1 / math.sqrt(32), rel=1e-12)


def test_grpo_adds_no_epsilon_so_the_scale_of_the_reward_does_not_matter():
    reward = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(grpo_coefficients(reward * 1e-9)[0], grpo_coefficients(reward)[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("value", (0.0, 1.0, 0.1))
@pytest.mark.parametrize("estimator", (rloo_coefficients, grpo_coefficients))
def test_equal_rewards_teach_nothing(estimator, value):
    # 0.1 · 7 / 7 is not 0.1 in floating point: a std of 1e-17 must not turn into advantages of size 1
    got = both_equal(estimator(torch.full((2, 7), value, dtype=torch.float64)))
    assert got.abs().max() < 1e-15


def test_maxrl_matches_its_papers_example_and_is_zero_when_nothing_succeeds():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    expected = [[3.0, -1.0, -1.0, -1.0], [0.0] * 4, [0.0] * 4, [1.0, 1.0, -1.0, -1.0]]
    assert both_equal(maxrl_coefficients(reward)).tolist() == expected


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_failed_sample_equals_a_smaller_group_and_its_value_is_never_read(estimator):
    reward = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    keep = [0, 3, 4]
    valid = torch.zeros(40, 6, dtype=torch.bool)
    valid[:, keep] = True
    for rubbish in (1.0, float("nan"), float("inf")):
        got = both_equal(estimator(torch.where(valid, reward, rubbish), valid))
        torch.testing.assert_close(got[:, keep], estimator(reward[:, keep])[0])
        assert (got[~valid] == 0.0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_prompt_without_two_samples_gets_zeros(estimator):
    valid = torch.tensor([[True, False, False], [False, False, False]])
    got = both_equal(estimator(torch.ones(2, 3), valid))
    assert torch.equal(got, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_nan_reward_surfaces_in_its_own_prompt_only(estimator):
    got = both_equal(estimator(torch.tensor([[1.0, float("nan"), 0.0], [1.0, 0.0, 0.0]])))
    assert torch.isnan(got[0]).all() and torch.isfinite(got[1]).all()


def test_sft_weighs_the_given_answer_and_a_rationale_only_where_it_is_annotated():
    valid = torch.tensor([[True, True], [True, False]])
    rationale, answer = sft_coefficients(valid)
    assert torch.equal(answer, valid.double()) and torch.equal(rationale, torch.zeros(2, 2, dtype=torch.float64))
    rationale, answer = sft_coefficients(valid, rationale_given=True)
    assert torch.equal(answer, valid.double()) and torch.equal(rationale, valid.double())


BINARY = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.0] * 5])


def test_star_imitates_accepted_samples_with_weight_one_a_prompt():
    got = both_equal(star_coefficients(BINARY))
    assert got.tolist() == [[2.5, 0, 0, 2.5, 0], [0, 0, 5, 0, 0], [0] * 5]
    masked = both_equal(star_coefficients(BINARY, torch.tensor([[True, True, True, False, True]] * 3)))
    assert masked[0].tolist() == [4.0, 0, 0, 0, 0] and masked[2].tolist() == [0] * 5


def test_star_is_the_mean_of_paft_at_q_one_with_binary_weights():
    draws, resamples = 400, 50
    generator = torch.Generator().manual_seed(2)
    log_w = BINARY[:2].log()
    mean = (
        sum(paft_coefficients(log_w, 1.0, resamples, generator=generator, normalize=False) for _ in range(draws))
        / draws
    )
    # PAFT's sums are divided by K, STaR's by M_b
    torch.testing.assert_close(mean / resamples, star_coefficients(BINARY[:2])[0] / 5, rtol=0.02, atol=1e-12)


def test_maxrl_is_garl_at_q_one_with_binary_weights():
    rationale, _ = garl_coefficients(BINARY[:2].log(), 1.0, normalize=False)
    torch.testing.assert_close(rationale, both_equal(maxrl_coefficients(BINARY[:2])))


def test_verifree_is_garl_at_q_zero():
    """w_m - mean of the others' w for the rationale, w_m for the answer (arXiv:2505.21493, eq. 6)."""
    weight = torch.tensor([[0.5, 0.125, 0.25, 0.0625]], dtype=torch.float64)
    rationale, answer = garl_coefficients(weight.log(), 0.0)
    others = [[statistics.fmean(row[:m] + row[m + 1 :]) for m in range(4)] for row in weight.tolist()]
    torch.testing.assert_close(rationale, weight - torch.tensor(others, dtype=torch.float64))
    torch.testing.assert_close(answer, weight)


def test_iwae_is_garl_at_q_one():
    """Normalised weights for both log-likelihoods (Burda et al. 2015, eq. 14), M_b times as the loss divides by M_b,
    and 1 less for the rationale: the leave-one-out baseline.
    """
    log_w = torch.tensor([[-3.0, -700.0, -2.0, -2.5]], dtype=torch.float64)
    rationale, answer = garl_coefficients(log_w, 1.0, normalize=False)
    torch.testing.assert_close(answer, 4 * torch.softmax(log_w, dim=1))
    torch.testing.assert_close(rationale, 4 * torch.softmax(log_w, dim=1) - 1)


def test_trice_is_paft_at_q_one():
    """Its gradient is the posterior mean of that of ln p(z,y|x) (Phan et al., arXiv:2312.02179), without a factor P.
    Of M rationales, posterior weights are w_m / Σw: each draw has weight 1, and m is drawn as often as these say.
    """
    log_w = torch.tensor([[-3.0, -700.0, -2.0, -2.5], [-800.0, -801.0, -802.0, -900.0]], dtype=torch.float64)
    resamples = 100_000
    joint = paft_coefficients(log_w, 1.0, resamples, generator=torch.Generator().manual_seed(3), normalize=False)
    assert torch.equal(joint, joint.round()) and joint.sum(dim=1).tolist() == [resamples] * 2
    torch.testing.assert_close(joint / resamples, torch.softmax(log_w, dim=1), rtol=0, atol=0.01)
