"""PAFT's coefficients: the draw, the attenuation, masks. Its expectation is enumerated in test_objective_estimators."""

import math

import mpmath
import pytest
import torch

from megatron_jq.errors import UserError
from megatron_jq.objective.garl import garl_plug_in_coefficients
from megatron_jq.objective.paft import paft_attenuation, paft_coefficients, resample_counts

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
INF = float("inf")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("q", (*QS, 1.0 - 1e-12))
def test_attenuation_agrees_with_sixty_digits(q, normalize):
    pools = ((-1.0, -2.0, -3.0), (-5.0, -900.0, -901.0), (-1000.0, -1000.5, -1002.0), (-INF, -3.0, -INF))
    with mpmath.workdps(60):
        means = [sum(mpmath.exp(mpmath.mpf(x)) for x in pool) / 3 for pool in pools]
        factor = mpmath.mpf(3) ** -mpmath.mpf(q) if normalize else mpmath.mpf(1)
        expected = [float(factor * mean ** (1 - mpmath.mpf(q))) for mean in means]
    got = paft_attenuation(torch.tensor(pools, dtype=torch.float64), q, normalize=normalize)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=2e-13, atol=1e-300)


def test_counts_follow_the_categorical_of_the_weights():
    log_w = torch.tensor([[-700.0, -701.0, -702.5, -703.0], [-5.0, -5.0, -900.0, -4.0]], dtype=torch.float64)
    draws = 200_000
    counts = resample_counts(log_w, draws, generator=seeded())
    share = torch.softmax(log_w, 1)
    assert torch.equal(counts.sum(1), torch.full((2,), float(draws), dtype=torch.float64))
    deviation = (counts / draws - share).abs()
    assert (deviation <= 5.0 * (share * (1 - share) / draws).sqrt()).all()  # five standard errors, a fixed seed


def test_counts_are_those_of_inverting_the_cdf_by_hand():
    log_w = torch.tensor([[-50.0, -51.0, -INF, -50.5]], dtype=torch.float64)
    uniforms = torch.rand(1, 40, generator=seeded(7), dtype=torch.float64)[0].tolist()
    weights = [math.exp(x) for x in log_w[0].tolist()]
    expected = [0.0] * 4
    for u in uniforms:
        reached = 0.0
        for index, weight in enumerate(weights):
            reached += weight / sum(weights)
            if u < reached:
                expected[index] += 1.0
                break
    assert resample_counts(log_w, 40, generator=seeded(7)).tolist() == [expected]


def test_draws_are_a_pure_function_of_the_generators_state():
    log_w = -5.0 * torch.rand(6, 8, generator=seeded(1), dtype=torch.float64)
    one = paft_coefficients(log_w, 0.75, 8, generator=seeded(3))
    torch.manual_seed(999)  # the global generator is not consulted
    assert torch.equal(one, paft_coefficients(log_w, 0.75, 8, generator=seeded(3)))
    assert not torch.equal(one, paft_coefficients(log_w, 0.75, 8, generator=seeded(4)))


def test_the_generator_advances_alike_whatever_the_table_holds():
    tables = (torch.full((3, 4), -1.0), torch.full((3, 4), -INF), torch.randn(3, 4, generator=seeded()) - 800.0)
    masks = (None, None, torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]]))
    states = []
    for table, mask in zip(tables, masks, strict=True):
        generator = seeded(5)
        resample_counts(table, 7, generator=generator, valid_BM=mask)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_zero_weights_and_invalid_rationales_are_never_drawn():
    log_w = torch.tensor([[-INF, -3.0, -INF, -3.0, -INF], [-1.0, -800.0, -2.0, -1.0, -3.0]], dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [False, True, False, False, True]])
    counts = resample_counts(log_w, 5000, generator=seeded(), valid_BM=valid)
    assert counts[0, [0, 2, 4]].tolist() == [0.0] * 3 and (counts[0, [1, 3]] > 2000).all()
    assert counts[1].tolist() == [0.0, 0.0, 0.0, 0.0, 5000.0]


@pytest.mark.parametrize("edge", (0.0, 1.0 - 2.0**-53))
def test_the_extreme_uniforms_hit_the_first_and_last_rationale_with_mass(edge, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, edge, dtype=torch.float64))
    log_w = torch.tensor([[-INF, -0.1, -0.3, -0.7, -INF], [-INF, -1.0, -1.0, -1.0, -INF]], dtype=torch.float64)
    counts = resample_counts(log_w, 3, generator=seeded())
    expected = [0.0, 3.0, 0.0, 0.0, 0.0] if edge == 0.0 else [0.0, 0.0, 0.0, 3.0, 0.0]
    assert counts.tolist() == [expected, expected]


@pytest.mark.parametrize("q", QS)
def test_a_failed_rationale_equals_a_smaller_group_draw_for_draw(q):
    log_w = -5.0 * torch.rand(6, 8, generator=seeded(1), dtype=torch.float64)
    keep = [1, 2, 5, 7]
    valid = torch.zeros(6, 8, dtype=torch.bool)
    valid[:, keep] = True
    table = torch.where(valid, log_w, float("nan"))
    full = paft_coefficients(table, q, 16, generator=seeded(2), valid_BM=valid)
    small = paft_coefficients(log_w[:, keep], q, 16, generator=seeded(2))
    torch.testing.assert_close(full[:, keep], small, rtol=1e-13, atol=0.0)
    assert (full[~valid] == 0.0).all()


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("q", QS)
def test_the_joint_coefficient_averages_to_k_over_m_times_garls_plug_in(q, normalize):
    log_w = torch.tensor([[-2.0, -1.0, -4.0, -2.5]], dtype=torch.float64)
    draws = 400_000
    joint = paft_coefficients(log_w, q, draws, generator=seeded(), normalize=normalize)
    plug_in = garl_plug_in_coefficients(log_w, q, normalize=normalize)
    torch.testing.assert_close(joint / draws, plug_in / 4, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("q", QS)
def test_one_rationale_is_enough_and_none_or_no_mass_gives_zeros(q):
    log_w = torch.tensor([[-2.0, -1.0], [-2.0, -1.0], [-INF, -INF]])
    valid = torch.tensor([[False, True], [False, False], [True, True]])
    joint = paft_coefficients(log_w, q, 3, generator=seeded(), valid_BM=valid)
    assert joint[0].tolist() == [0.0, pytest.approx(3.0 * math.exp(-(1.0 - q)))]
    assert torch.equal(joint[1:], torch.zeros(2, 2, dtype=torch.float64))
    counts = resample_counts(log_w, 3, generator=seeded(), valid_BM=valid)
    assert counts.tolist() == [[0.0, 3.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("q", QS)
def test_a_nan_weight_surfaces_in_its_own_prompt_only(q):
    log_w = torch.tensor([[-1.0, float("nan"), -3.0], [-1.0, -2.0, -3.0]])
    joint = paft_coefficients(log_w, q, 4, generator=seeded())
    assert torch.isnan(joint[0]).all() and torch.isfinite(joint[1]).all()


def test_at_q_1_normalised_the_step_weighs_the_prompts_alike_however_cold():
    log_w = torch.tensor([[-1.0, -1.5], [-900.0, -903.0]], dtype=torch.float64)
    joint = paft_coefficients(log_w, 1.0, 10, generator=seeded())
    torch.testing.assert_close(joint.sum(1), torch.full((2,), 10 / 2, dtype=torch.float64))


def test_coefficients_are_float64_constants_without_gradient():
    joint = paft_coefficients(torch.tensor([[-1.0, -2.0]], requires_grad=True), 0.5, 2, generator=seeded())
    assert joint.dtype == torch.float64 and not joint.requires_grad


def test_bad_q_and_bad_k_are_refused():
    log_w = torch.tensor([[-1.0, -2.0]])
    with pytest.raises(UserError, match="0, 1"):
        paft_coefficients(log_w, 1.1, 2, generator=seeded())
    with pytest.raises(UserError, match="at least one resample"):
        paft_coefficients(log_w, 0.5, 0, generator=seeded())
