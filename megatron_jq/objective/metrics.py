"""Evaluation by k samples, and how many of M weights count. Pure functions, no model."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from math import comb
from operator import eq

import torch

from megatron_jq.errors import UserError
from megatron_jq.objective.tsallis import centred_weights, has_mass
from megatron_jq.seeds import short_seed


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased for "best of k" (Chen et al. 2021, arXiv:2107.03374). The paper's p@1 and p@16 are k = 1 and k = n = 16.
    Exact integers inside, one rounding. Raises UserError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k} needs at least {max(k, 1)} samples and k >= 1, got {num_samples} samples")
    if not 0 <= num_correct <= num_samples:
        raise UserError(f"{num_correct} correct of {num_samples} samples is impossible")
    total = comb(num_samples, k)
    return (total - comb(num_samples - num_correct, k)) / total


def majority_at_k(
    answers: Sequence[Hashable],
    gold: Hashable,
    k: int,
    *,
    is_correct: Callable[[Hashable, Hashable], bool] = eq,
) -> bool:
    """Whether the majority vote of the first k answers is correct (the paper's m@16 is k = 16).

    Answers vote by equality: what a judge holds equal must have one key. A tie goes to the answer that was seen first
    among those tied: deterministic, and fair because samples are exchangeable. `is_correct(answer, gold)` judges the
    winner; the paper's evaluation asks whether the gold string is a substring of the answer, the default is equality.
    Raises UserError unless 1 <= k <= len(answers).
    """
    if not 1 <= k <= len(answers):
        raise UserError(f"maj@{k} needs at least {max(k, 1)} answers and k >= 1, got {len(answers)} answers")
    # most_common sorts stably, and a Counter keeps the order of first appearance.
    winner, _ = Counter(answers[:k]).most_common(1)[0]
    return is_correct(winner, gold)


def effective_sample_size(log_w_BM: torch.Tensor, valid_BM: torch.Tensor | None = None) -> torch.Tensor:
    """(sum w)² / sum w², [B] float64: between 1 (one weight has it all) and M_b (all equal) (Kish 1965).

    Independent of the scale of w. 0 for a prompt with no valid rationale or whose weights are all zero.
    """
    relative_BM, _, _ = centred_weights(log_w_BM, valid_BM)
    weight_BM = torch.exp(relative_BM)  # the largest is 1: what underflows does not count
    size_B = weight_BM.sum(dim=1).square() / weight_BM.square().sum(dim=1)
    return torch.where(has_mass(relative_BM)[:, 0], size_B, 0.0)


def bootstrap_interval(
    values_B: torch.Tensor, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (Efron 1979), the same for the same seed.

    values_B: one value a prompt; prompts are drawn with replacement. One prompt has an interval of no width, which says
    nothing of how sure it is. Raises UserError unless B >= 1, resamples >= 1 and 0 < confidence < 1.
    """
    if len(values_B) == 0:
        raise UserError("an interval needs at least one prompt, got none")
    if resamples < 1 or not 0 < confidence < 1:
        raise UserError(f"an interval needs resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence}")
    values_B = values_B.double().cpu()
    generator = torch.Generator().manual_seed(short_seed(seed))
    drawn = [
        values_B[torch.randint(len(values_B), values_B.shape, generator=generator)].mean() for _ in range(resamples)
    ]
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(drawn), tails).tolist()
    return low, high
