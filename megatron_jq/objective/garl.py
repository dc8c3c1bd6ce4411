"""GARL, gradient-amplified RL: sample from the prior, amplify the RL gradient (Algorithm 1, eq. 12).

The coefficients are constants (no gradient) of the surrogate loss
    -(1/B) sum_b (1/M_b) sum_m [ rationale_bm · ln p(z_m|x) + answer_bm · ln p(y*|x,z_m) ].
With `normalize` they carry the algorithm's factor 1/M_b^q, which bounds the effective reward w_m / w̄^q by 1.
"""

import torch

from megatron_jq.objective.tsallis import centred_weights, check_q, has_mass, log_power


def leave_one_out_log_mean(relative_BM: torch.Tensor, count_B1: torch.Tensor) -> torch.Tensor:
    """ln w̄_¬m = logsumexp_{j≠m}(ln w_j) - ln(M_b - 1), [B, M].

    A sum over the others, not total minus own: when w_m dominates, that difference cancels to zero. Takes O(B·M²)
    memory. Masked entries come in as -inf; -inf comes out where the others have no mass.
    """
    num_rationales = relative_BM.shape[1]
    own_MM = torch.eye(num_rationales, dtype=torch.bool, device=relative_BM.device)
    others_BMM = relative_BM[:, None, :].masked_fill(own_MM, -torch.inf)
    # The clamp touches only prompts with a single rationale, whose coefficients are set to zero by the caller.
    return torch.logsumexp(others_BMM, dim=2) - (count_B1 - 1.0).clamp(min=1.0).log()


def garl_plug_in_coefficients(
    log_w_BM: torch.Tensor, q: float, *, normalize: bool = True, valid_BM: torch.Tensor | None = None
) -> torch.Tensor:
    """w_m / w̄^q (over M_b^q with normalize), [B, M] float64: eq. 12 without its baseline, for z and y* alike.

    This is the exact gradient of l_q(w̄) with the rationales held fixed, and E[PAFT | pool] (Prop. D.3).
    Invalid entries are 0; so is a prompt without mass (every w is 0), where w / w̄^q is 0/0.
    Raises UserError for q outside [0, 1].
    """
    check_q(q)
    relative_BM, log_top_B1, valid_BM = centred_weights(log_w_BM, valid_BM)
    log_count_B1 = valid_BM.sum(dim=1, keepdim=True).double().log()
    log_mean_B1 = torch.logsumexp(relative_BM, dim=1, keepdim=True) - log_count_B1
    # ln w̄^(1-q) splits into (1-q)·top and a part of order ln M. Kept apart, ln w = -1000 costs no digits.
    scale_B1 = torch.exp((1.0 - q) * log_top_B1 - (q * log_count_B1 if normalize else 0.0))
    weight_BM = scale_B1 * torch.exp(relative_BM - log_power(log_mean_B1, q))
    return torch.where(valid_BM & has_mass(relative_BM), weight_BM, 0.0)


def garl_coefficients(
    log_w_BM: torch.Tensor, q: float, *, normalize: bool = True, valid_BM: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """GARL's two constants a rationale (Algorithm 1, eq. 12), with the leave-one-out control variate of Prop. 6.2.

        rationale_m = c_m = w_m / w̄^q - w̄_¬m^(1-q)        answer_m = w_m / w̄^q        both over M_b^q with normalize

    log_w_BM: ln p(y*|x,z_m), [B, M], nats, any float dtype; -inf is allowed. valid_BM: bool [B, M], None for all.
    Returns (rationale_BM, answer_BM), float64, without gradient. Invalid entries are exactly 0 and touch no others.
    A prompt with fewer than two valid rationales gets zeros, for it has no baseline. So does a prompt whose weights are
    all zero, where w / w̄^q is 0/0: it stays in the batch, with nothing to learn from. In the baseline, 0^0 = 1 (q = 1).
    Poles: q = 0 is RB-RLOO (VeriFree's objective with a baseline), q = 1 is IWAE with c_m = w_m / w̄ - 1.
    Raises UserError for q outside [0, 1].
    """
    answer_BM = garl_plug_in_coefficients(log_w_BM, q, normalize=normalize, valid_BM=valid_BM)
    relative_BM, log_top_B1, valid_BM = centred_weights(log_w_BM, valid_BM)
    count_B1 = valid_BM.sum(dim=1, keepdim=True).double()
    log_others_BM = leave_one_out_log_mean(relative_BM, count_B1)
    scale_B1 = torch.exp((1.0 - q) * log_top_B1 - (q * count_B1.log() if normalize else 0.0))
    baseline_BM = scale_B1 * torch.exp(log_power(log_others_BM, 1.0 - q))
    keep_BM = valid_BM & (count_B1 >= 2) & has_mass(relative_BM)
    return torch.where(keep_BM, answer_BM - baseline_BM, 0.0), torch.where(keep_BM, answer_BM, 0.0)


def effective_reward_max(log_w_BM: torch.Tensor, q: float, valid_BM: torch.Tensor | None = None) -> torch.Tensor:
    """max_m c_m / M_b^q, [B] float64: what Figure 3 plots against the step. 0 where GARL has no coefficients.

    The largest c_m is never negative (its w_m is at least w̄, and w̄ at least w̄_¬m), so the zeros of masked entries
    cannot win. It stays flat at zero through a cold start unless q is large. Raises UserError for q outside [0, 1].
    """
    rationale_BM, _ = garl_coefficients(log_w_BM, q, normalize=True, valid_BM=valid_BM)
    return rationale_BM.amax(dim=1)
