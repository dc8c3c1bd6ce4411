"""The baselines as coefficients of the same two log-likelihoods, so that one trainer serves them all.

Surrogate loss: -(1/B) sum_b (1/M_b) sum_m [ rationale_bm · ln p(z_m|x) + answer_bm · ln p(y_m|x,z_m) ]. For RLOO, GRPO
and MaxRL y_m is the SAMPLED answer and both constants are one advantage; for SFT it is the given answer.
All return (rationale_BM, answer_BM), float64, without gradient, exactly 0 where invalid. Rewards are [B, M], in the
paper exact match in {0, 1}. No epsilon: a degenerate group has a defined value, zero.
"""

import torch

from megatron_jq.objective.tsallis import resolve_valid


def _masked_rewards(
    reward_BM: torch.Tensor, valid_BM: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reward_BM float64 with invalid entries 0, valid_BM, count_B1 float64)."""
    valid_BM = resolve_valid(reward_BM, valid_BM)
    reward_BM = torch.where(valid_BM, reward_BM.detach().double(), 0.0)
    return reward_BM, valid_BM, valid_BM.sum(dim=1, keepdim=True).double()


def rloo_coefficients(
    reward_BM: torch.Tensor, valid_BM: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RLOO: A_m = r_m - mean_{j≠m} r_j (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

    Unbiased for the gradient of the expected reward: GARL at q = 0 with the answer sampled instead of summed out.
    A prompt with fewer than two valid samples gets zeros.
    """
    reward_BM, valid_BM, count_B1 = _masked_rewards(reward_BM, valid_BM)
    others_BM = (reward_BM.sum(dim=1, keepdim=True) - reward_BM) / (count_B1 - 1.0).clamp(min=1.0)
    advantage_BM = torch.where(valid_BM & (count_B1 >= 2), reward_BM - others_BM, 0.0)
    return advantage_BM, advantage_BM.clone()


def grpo_coefficients(
    reward_BM: torch.Tensor, valid_BM: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO: A_m = (r_m - mean r) / std r over the group (Shao et al. 2024, arXiv:2402.03300, section 4.1).

    That paper leaves the estimator of std open. Ours is the sample standard deviation (divisor M_b - 1), as torch.std
    gives it in TRL and verl. They add an epsilon; we do not: a group of equal rewards, std = 0, gets zeros, and so does
    one with fewer than two valid samples. For updates after the first on one rollout, and the KL: clipping.py.
    """
    reward_BM, valid_BM, count_B1 = _masked_rewards(reward_BM, valid_BM)
    centred_BM = torch.where(valid_BM, reward_BM - reward_BM.sum(dim=1, keepdim=True) / count_B1.clamp(min=1.0), 0.0)
    std_B1 = (centred_BM.square().sum(dim=1, keepdim=True) / (count_B1 - 1.0).clamp(min=1.0)).sqrt()
    # Equality is read off the rewards: rounding in the mean can leave a tiny std, which would blow noise up to size 1.
    largest_B1 = reward_BM.masked_fill(~valid_BM, -torch.inf).amax(dim=1, keepdim=True)
    smallest_B1 = reward_BM.masked_fill(~valid_BM, torch.inf).amin(dim=1, keepdim=True)
    keep_BM = valid_BM & (count_B1 >= 2) & (largest_B1 != smallest_B1)
    advantage_BM = torch.where(keep_BM, centred_BM / std_B1, 0.0)
    return advantage_BM, advantage_BM.clone()


def maxrl_coefficients(
    reward_BM: torch.Tensor, valid_BM: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """MaxRL: A_m = r_m / mean r - 1, and zeros when nothing succeeds (Tajwar et al. 2026, arXiv:2602.02710).

    GARL at q = 1 with binary w: rewards [1, 0, 0, 0] give [3, -1, -1, -1]. Rewards are binary (or non-negative).
    """
    reward_BM, valid_BM, count_B1 = _masked_rewards(reward_BM, valid_BM)
    mean_B1 = reward_BM.sum(dim=1, keepdim=True) / count_B1.clamp(min=1.0)
    advantage_BM = torch.where(valid_BM & (mean_B1 != 0), reward_BM / mean_B1 - 1.0, 0.0)
    return advantage_BM, advantage_BM.clone()


def star_coefficients(
    reward_BM: torch.Tensor, valid_BM: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """STaR: imitate accepted samples alone, r_m / mean r (Zelikman et al. 2022, arXiv:2203.14465), binary rewards.

    Each prompt that succeeds has weight 1, shared by its accepted samples: PAFT at q = 1 with binary w, averaged over
    its draws. Prompts without success get zeros.
    """
    reward_BM, valid_BM, count_B1 = _masked_rewards(reward_BM, valid_BM)
    mean_B1 = reward_BM.sum(dim=1, keepdim=True) / count_B1.clamp(min=1.0)
    accepted_BM = torch.where(mean_B1 != 0, reward_BM / mean_B1, 0.0)
    return accepted_BM, accepted_BM.clone()


def sft_coefficients(valid_BM: torch.Tensor, *, rationale_given: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """SFT: answer 1 for the given answer; rationale 1 where z is annotated, 0 where the policy sampled it.

    Imitating a sample of one's own has zero expected gradient and only adds noise. With sampled rationales the loss is
    the mean of -ln w, at least -ln w̄ (Jensen): it teaches the answer, and never prefers one rationale to another. The
    paper's own SFT pole, the marginal likelihood, is GARL or PAFT at q = 1.
    """
    assert valid_BM.dtype == torch.bool and valid_BM.ndim == 2, "valid_BM: bool [B, M]"
    answer_BM = valid_BM.double()
    return answer_BM.clone() if rationale_given else torch.zeros_like(answer_BM), answer_BM
