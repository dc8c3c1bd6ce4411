"""GARL's coefficients: arithmetic in log space down to ln w = -1000, masks, poles and bounds."""

import math

import mpmath
import pytest
import torch

from megatron_jq.errors import UserError
from megatron_jq.objective.baselines import maxrl_coefficients
from megatron_jq.objective.garl import effective_reward_max, garl_coefficients, garl_plug_in_coefficients

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
INF = float("inf")
POOLS = (
    (-1.0, -2.0, -0.5, -3.0),
    (-200.1, -200.2, -231.0, -199.7),
    (-1000.0, -990.0, -1003.5, -995.25),
    (-5.0, -900.0, -900.0, -901.0),  # the baseline of the first is e^-900: total minus own would give 0
    (-900.0, -5.0, -6.0, -1000.0),
    (-INF, -3.0, -INF, -4.0),
    (-INF, -800.0, -INF, -INF),
    (0.0, -INF, -INF, -INF),
)


def random_pools(seed: int, spread: float = 30.0) -> torch.Tensor:
    return -spread * torch.rand(64, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_coefficients(pool: tuple[float, ...], q: float, normalize: bool) -> tuple[list[float], list[float]]:
    """Algorithm 1 in 120 digits, from w itself."""
    with mpmath.workdps(120):
        power = mpmath.mpf(q)
        weights = [mpmath.exp(mpmath.mpf(x)) for x in pool]
        count = len(weights)
        mean = sum(weights) / count
        factor = mpmath.mpf(count) ** -power if normalize else mpmath.mpf(1)
        answer = [factor * w / mean**power for w in weights]
        others = [(sum(weights[:m] + weights[m + 1 :]) / (count - 1)) ** (1 - power) for m in range(count)]
        return [float(a - factor * b) for a, b in zip(answer, others, strict=True)], [float(a) for a in answer]


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("q", (*QS, 1.0 - 1e-12))
def test_coefficients_agree_with_120_digits_down_to_minus_1000(q, normalize):
    rationale, answer = garl_coefficients(torch.tensor(POOLS, dtype=torch.float64), q, normalize=normalize)
    exact = [exact_coefficients(pool, q, normalize) for pool in POOLS]
    expected_rationale = torch.tensor([r for r, _ in exact], dtype=torch.float64)
    expected_answer = torch.tensor([a for _, a in exact], dtype=torch.float64)
    assert torch.isfinite(rationale).all() and torch.isfinite(answer).all()
    # 1e-300: below it float64 itself has fewer digits
    torch.testing.assert_close(answer, expected_answer, rtol=2e-13, atol=1e-300)
    # c is a difference of two such terms, so its error is measured against the larger one
    size = torch.maximum(expected_answer, (expected_answer - expected_rationale).abs())
    assert ((rationale - expected_rationale).abs() <= 2e-13 * size + 1e-300).all()


def test_the_amplification_survives_where_float32_weights_are_zero():
    log_w = torch.tensor([[-300.0, -301.0, -302.0, -310.0]])
    assert (log_w.exp() == 0).all()
    shifted = garl_coefficients(log_w + 300.0, 1.0)
    for got, expected in zip(garl_coefficients(log_w, 1.0), shifted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0.0)
    assert garl_coefficients(log_w, 1.0)[0].max() > 0.4


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("q", QS)
def test_adding_c_to_every_ln_w_scales_the_coefficients_by_exp_of_1_minus_q_times_c(q, normalize):
    log_w = random_pools(0)
    for shift in (-3.0, -40.0):
        moved = garl_coefficients(log_w + shift, q, normalize=normalize)
        for got, base in zip(moved, garl_coefficients(log_w, q, normalize=normalize), strict=True):
            torch.testing.assert_close(got, base * math.exp((1.0 - q) * shift), rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("q", QS)
def test_a_failed_rationale_equals_a_smaller_group_and_its_value_is_never_read(q):
    log_w = random_pools(1)
    keep = [0, 2, 3, 6]
    valid = torch.zeros(64, 8, dtype=torch.bool)
    valid[:, keep] = True
    expected = garl_coefficients(log_w[:, keep], q)
    for rubbish in (0.0, -INF, INF, float("nan")):
        got = garl_coefficients(torch.where(valid, log_w, rubbish), q, valid_BM=valid)
        for full, small in zip(got, expected, strict=True):
            torch.testing.assert_close(full[:, keep], small, rtol=1e-13, atol=1e-300)
            assert (full[~valid] == 0.0).all()


def test_a_false_zero_would_have_changed_the_others():
    log_w = torch.tensor([[-3.0, -4.0, -5.0, -INF]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True, False]])
    with_mask = garl_coefficients(log_w, 0.75, normalize=False, valid_BM=valid)[1]
    with_zero = garl_coefficients(log_w, 0.75, normalize=False)[1]
    torch.testing.assert_close(with_zero[0, :3] / with_mask[0, :3], torch.full((3,), (4 / 3) ** 0.75).double())


def test_masks_may_differ_between_prompts_and_prompts_do_not_touch_each_other():
    log_w = random_pools(2)
    valid = torch.rand(64, 8, generator=torch.Generator().manual_seed(3)) < 0.6
    together = garl_coefficients(log_w, 0.75, valid_BM=valid)
    for row in range(64):
        alone = garl_coefficients(log_w[row : row + 1], 0.75, valid_BM=valid[row : row + 1])
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got[row : row + 1], expected)


@pytest.mark.parametrize("q", QS)
def test_a_prompt_with_fewer_than_two_valid_rationales_gets_zeros(q):
    log_w = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    valid = torch.tensor([[False, True, False], [False, False, False]])
    for got in garl_coefficients(log_w, q, valid_BM=valid):
        assert torch.equal(got, torch.zeros(2, 3, dtype=torch.float64))
    for got in garl_coefficients(torch.tensor([[-1.0]]), q):
        assert torch.equal(got, torch.zeros(1, 1, dtype=torch.float64))
    plug_in = garl_plug_in_coefficients(log_w, q, valid_BM=valid)  # needs no baseline: one rationale is enough
    assert plug_in[0].tolist() == [0.0, pytest.approx(math.exp(-2.0 * (1.0 - q))), 0.0]
    assert torch.equal(plug_in[1], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("q", QS)
def test_a_prompt_whose_weights_are_all_zero_gets_zeros(q):
    log_w = torch.tensor([[-INF, -INF, -INF], [-1.0, -2.0, -3.0]])
    for got in garl_coefficients(log_w, q):
        assert torch.equal(got[0], torch.zeros(3, dtype=torch.float64)) and torch.isfinite(got).all()
        assert (got[1] != 0.0).any()


@pytest.mark.parametrize("fault", (float("nan"), INF))
@pytest.mark.parametrize("q", QS)
def test_a_non_finite_valid_weight_surfaces_in_its_own_prompt_only(q, fault):
    log_w = torch.tensor([[-1.0, fault, -3.0], [-1.0, -2.0, -3.0]])
    for got in garl_coefficients(log_w, q):
        assert not torch.isfinite(got[0]).any() and torch.isfinite(got[1]).all()


@pytest.mark.parametrize("q", QS)
def test_equal_weights_leave_nothing_to_the_score_function(q):
    log_w = torch.full((1, 7), -700.0, dtype=torch.float64)
    rationale, answer = garl_coefficients(log_w, q, normalize=False)
    assert rationale.abs().max() <= 1e-14 * answer.max()
    expected = torch.full((1, 7), math.exp(-700.0 * (1 - q)), dtype=torch.float64)
    torch.testing.assert_close(answer, expected, rtol=1e-12, atol=0.0)


def test_q_0_is_rao_blackwellised_reinforce_with_a_leave_one_out_baseline():
    log_w = random_pools(4, spread=5.0)
    w = log_w.exp()
    others = torch.stack([torch.cat([w[:, :m], w[:, m + 1 :]], 1).mean(1) for m in range(8)], 1)
    rationale, answer = garl_coefficients(log_w, 0.0)
    torch.testing.assert_close(answer, w)
    torch.testing.assert_close(rationale, w - others)


def test_q_1_is_iwae_with_c_equal_to_the_self_normalised_weight_minus_1():
    log_w = random_pools(5)
    share = torch.softmax(log_w, 1)
    rationale, answer = garl_coefficients(log_w, 1.0, normalize=False)
    torch.testing.assert_close(answer, 8 * share)
    torch.testing.assert_close(rationale, 8 * share - 1.0)
    torch.testing.assert_close(garl_coefficients(log_w, 1.0)[0], share - 1.0 / 8)


def test_binary_weights_at_q_1_are_maxrl_and_zero_weights_are_learned_from_unless_all_are_zero():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0] * 4])
    rationale, _ = garl_coefficients(reward.log(), 1.0, normalize=False)
    torch.testing.assert_close(rationale, maxrl_coefficients(reward)[0])
    torch.testing.assert_close(rationale[0], torch.tensor([3.0, -1.0, -1.0, -1.0]).double())


@pytest.mark.parametrize("q", QS)
def test_with_normalize_the_effective_reward_is_bounded_by_1_and_reaches_m_to_the_q_without(q):
    for spread in (1.0, 30.0, 900.0):
        _, answer = garl_coefficients(random_pools(6, spread), q)
        assert answer.max() <= 1.0 + 1e-12 and answer.min() >= 0.0
    lone = torch.tensor([[0.0, -INF, -INF, -INF]])
    assert garl_coefficients(lone, q, normalize=False)[1].max().item() == pytest.approx(4.0**q)
    assert garl_coefficients(lone, q)[1].max().item() == pytest.approx(1.0)


@pytest.mark.parametrize("q", QS)
def test_effective_reward_max_is_the_largest_normalised_c_and_never_negative(q):
    log_w = random_pools(7)
    valid = torch.rand(64, 8, generator=torch.Generator().manual_seed(8)) < 0.7
    rationale, _ = garl_coefficients(log_w, q, valid_BM=valid)
    got = effective_reward_max(log_w, q, valid)
    for row in range(64):
        values = rationale[row][valid[row]].tolist()
        assert got[row].item() == pytest.approx(max(values, default=0.0), abs=1e-300)
    assert (got >= 0.0).all()


def test_at_a_cold_start_figure_3_leaves_zero_for_large_q_only():
    log_w = torch.tensor([[-60.0, -61.0, -62.0, -75.0]])
    low, high = effective_reward_max(log_w, 0.25).item(), effective_reward_max(log_w, 1.0).item()
    assert low < 1e-15 and high > 0.3


def test_coefficients_are_float64_constants_without_gradient():
    log_w = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    for got in (*garl_coefficients(log_w, 0.5), garl_plug_in_coefficients(log_w, 0.5)):
        assert got.dtype == torch.float64 and not got.requires_grad


@pytest.mark.parametrize("q", (-0.1, 1.5, float("nan")))
def test_q_outside_0_1_is_refused(q):
    with pytest.raises(UserError, match="0, 1"):
        garl_coefficients(torch.tensor([[-1.0, -2.0]]), q)
