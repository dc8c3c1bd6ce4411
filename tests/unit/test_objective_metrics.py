"""pass@k against all subsets, maj@k against counting by hand, effective sample size against its definition."""

import itertools

import numpy as np
import pytest
import torch

from megatron_jq.errors import UserError
from megatron_jq.objective.metrics import bootstrap_interval, effective_sample_size, majority_at_k, pass_at_k

INF = float("inf")


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample():
    for num_samples in (1, 2, 5, 7):
        for num_correct in range(num_samples + 1):
            samples = [True] * num_correct + [False] * (num_samples - num_correct)
            for k in range(1, num_samples + 1):
                subsets = list(itertools.combinations(samples, k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, rel=1e-15)


def test_pass_at_k_is_unbiased_for_best_of_k():
    p, n, k = 0.3, 6, 4
    expectation = 0.0
    for outcome in itertools.product((0, 1), repeat=n):
        chance = p ** sum(outcome) * (1 - p) ** (n - sum(outcome))
        expectation += chance * pass_at_k(n, sum(outcome), k)
    assert expectation == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(200, 1, 1), (200, 13, 10), (200, 40, 100), (200, 150, 100), (16, 3, 16)])
def test_pass_at_k_is_the_published_program_s(n, c, k):
    """The numerically stable script of Chen et al. 2021 (arXiv:2107.03374, figure 3)."""
    published = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(published, rel=1e-12)


def test_pass_at_k_keeps_its_digits_for_large_n():
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(2000, 1, 1000) == 0.5


@pytest.mark.parametrize("arguments", ((3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)))
def test_pass_at_k_refuses_what_cannot_be(arguments):
    with pytest.raises(UserError):
        pass_at_k(*arguments)


def test_majority_at_k_votes_over_the_first_k_only():
    answers = ["7", "9", "7", "9", "9"]
    assert majority_at_k(answers, "7", 3) and not majority_at_k(answers, "7", 5) and majority_at_k(answers, "9", 5)


def test_majority_at_k_gives_a_tie_to_the_answer_seen_first():
    assert majority_at_k(["b", "a", "a", "b"], "b", 4) and not majority_at_k(["b", "a", "a", "b"], "a", 4)
    assert majority_at_k(["a", "b"], "a", 2) and majority_at_k(["c", "a", "b", "b", "a"], "a", 5)


def test_majority_at_k_leaves_the_judgement_to_the_caller():
    def contains(answer: str, gold: str) -> bool:
        return gold in answer

    answers = ["it is 42", "it is 42", "41"]
    assert majority_at_k(answers, "42", 3, is_correct=contains) and not majority_at_k(answers, "42", 3)


@pytest.mark.parametrize("k", (0, 3))
def test_majority_at_k_refuses_more_votes_than_answers(k):
    with pytest.raises(UserError):
        majority_at_k(["a", "b"], "a", k)


def test_effective_sample_size_is_its_definition_and_does_not_see_the_scale():
    log_w = -4.0 * torch.rand(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = log_w.exp()
    expected = w.sum(1) ** 2 / (w**2).sum(1)
    torch.testing.assert_close(effective_sample_size(log_w), expected)
    torch.testing.assert_close(effective_sample_size(log_w - 950.0), expected, rtol=1e-11, atol=0.0)


def test_effective_sample_size_runs_from_1_to_the_number_of_valid_rationales():
    log_w = torch.tensor([[-900.0] * 4, [-5.0, -900.0, -900.0, -900.0], [-3.0, -3.0, -3.0, 0.0], [-INF] * 4])
    valid = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False], [True] * 4])
    assert effective_sample_size(log_w, valid).tolist() == [4.0, 1.0, 3.0, 0.0]
    assert effective_sample_size(log_w, torch.zeros(4, 4, dtype=torch.bool)).tolist() == [0.0] * 4


def test_the_bootstrap_interval_is_the_quantile_of_means_over_resampled_prompts():
    values = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values, resamples=20_000, confidence=0.9, seed=3)
    # by the central limit theorem: mean ± 1.645 standard errors
    error = values.std(unbiased=False).item() / 40**0.5
    assert low == pytest.approx(values.mean().item() - 1.645 * error, abs=0.06 * error)
    assert high == pytest.approx(values.mean().item() + 1.645 * error, abs=0.06 * error)
    assert (
        bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    )


def test_the_bootstrap_interval_of_two_prompts_by_all_resamples():
    # Means of two draws from {0, 1}: 0, 1/2, 1/2, 1. The middle half lies at 1/2, the middle 90 % reach the ends.
    values = torch.tensor([0.0, 1.0])
    assert bootstrap_interval(values, resamples=4000, confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval(values, resamples=4000, confidence=0.9) == (0.0, 1.0)
    assert bootstrap_interval(torch.tensor([0.25]), resamples=10) == (0.25, 0.25)


@pytest.mark.parametrize(("count", "settings"), ((0, {}), (2, {"resamples": 0}), (2, {"confidence": 1.0})))
def test_the_bootstrap_refuses_what_has_no_interval(count, settings):
    with pytest.raises(UserError):
        bootstrap_interval(torch.zeros(count), **settings)
