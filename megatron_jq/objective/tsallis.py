"""The loss family J_Q: the Tsallis logarithm of the success probability, in log space (Lin & Ie, arXiv:2604.25907v1).

Every function takes natural logarithms (nats) and computes in float64: at a cold start ln w is -200 and below, where w
itself is zero in float32. No epsilon is added anywhere, for it would cancel the amplification P^-q where it matters.
Shapes: B prompts, M rationales a prompt. A mask `valid_BM` names the rationales that exist; None means all of them.
A failed rationale leaves M. It is not a rationale with w = 0.
"""

import torch

from megatron_jq.errors import UserError

# Below this argument exp(x) - 1 loses nothing to cancellation, and above it expm1 is needed.
_EXPM1_SWITCH = -1.0


def check_q(q: float) -> None:
    """Raise UserError unless q lies in [0, 1], the paper's range (NaN does not)."""
    if not 0.0 <= q <= 1.0:
        raise UserError(f"q must lie in [0, 1], got {q}: 0 is the RLVR pole, 1 the log-likelihood pole")


def log_q(log_u: torch.Tensor | float, q: float) -> torch.Tensor:
    """Tsallis logarithm ln_q(u) = (u^(1-q) - 1) / (1-q), and ln u at q = 1, of u = exp(log_u) (eq. 1).

    log_u: any shape, in nats; u = 0 (log_u = -inf) gives -1/(1-q) below q = 1 and -inf at q = 1.
    Returns float64 of the same shape, differentiable: d ln_q(u) / d ln u = u^(1-q), accurate until it underflows.
    Raises UserError for q outside [0, 1].
    """
    check_q(q)
    log_u = torch.as_tensor(log_u, dtype=torch.float64)
    if q == 1.0:
        return log_u
    exponent = (1.0 - q) * log_u
    # torch differentiates expm1(x) as expm1(x) + 1, which rounds to zero below x = -37: at a cold start the gradient
    # would vanish. exp differentiates to itself. The clamps keep the branch not taken finite.
    far = torch.exp(exponent.clamp(max=_EXPM1_SWITCH)) - 1.0
    near = torch.expm1(exponent.clamp(min=_EXPM1_SWITCH))
    return torch.where(exponent < _EXPM1_SWITCH, far, near) / (1.0 - q)


def jq_loss(log_p: torch.Tensor | float, q: float) -> torch.Tensor:
    """Per-example loss l_q = -ln_q(P) of P = exp(log_p) (eq. 2); J_Q is its mean over the data set (eq. 3).

    q = 0 gives 1 - P, in [0, 1]; q = 1 gives -ln P. Same shape as log_p, float64.
    Raises UserError for q outside [0, 1].
    """
    return -log_q(log_p, q)


def log_power(log_u: torch.Tensor, exponent: float) -> torch.Tensor:
    """ln(u^exponent) with u^0 = 1 for every u, zero included: the poles of (5) and (12) need no special case."""
    if exponent == 0.0:
        return torch.where(log_u == -torch.inf, 0.0, exponent * log_u)  # 0 * NaN stays NaN: a fault is not hidden
    return exponent * log_u


def log_amplification(log_p: torch.Tensor, q: float) -> torch.Tensor:
    """ln of the factor P^-q in grad l_q = P^-q grad l_0: what J_Q does to the RL gradient (eq. 5, Prop. 4.1)."""
    check_q(q)
    return log_power(log_p.double(), -q)


def log_attenuation(log_p: torch.Tensor, q: float) -> torch.Tensor:
    """ln of the factor P^(1-q) in grad l_q = P^(1-q) grad l_1: what J_Q does to the likelihood gradient (eq. 5)."""
    check_q(q)
    return log_power(log_p.double(), 1.0 - q)


def resolve_valid(table_BM: torch.Tensor, valid_BM: torch.Tensor | None) -> torch.Tensor:
    """The mask as a bool tensor [B, M]; None means that every rationale is valid."""
    assert table_BM.ndim == 2, f"a [B, M] table is needed, got shape {tuple(table_BM.shape)}"
    if valid_BM is None:
        return torch.ones_like(table_BM, dtype=torch.bool)
    assert valid_BM.dtype == torch.bool and valid_BM.shape == table_BM.shape, "valid_BM: bool, one entry a rationale"
    return valid_BM


def log_mean_weight(log_w_BM: torch.Tensor, valid_BM: torch.Tensor | None = None) -> torch.Tensor:
    """ln w̄ = logsumexp_m(ln w_m) - ln M_b, the Monte Carlo estimate of ln P, [B], in nats, float64, differentiable.

    M_b counts the valid rationales of prompt b. A prompt without any has no estimate: NaN, not a false ln 0. Leave such
    prompts (prompt_mean_scale is 0 for them) out of any mean.
    """
    valid_BM = resolve_valid(log_w_BM, valid_BM)
    masked_BM = torch.where(valid_BM, log_w_BM.double(), -torch.inf)
    return torch.logsumexp(masked_BM, dim=1) - valid_BM.sum(dim=1).double().log()


def centred_weights(
    log_w_BM: torch.Tensor, valid_BM: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split ln w into its prompt's largest value and the rest, so that exponentials neither overflow nor lose digits.

    Returns (relative_BM, log_top_B1, valid_BM): ln w = relative + log_top, with relative <= 0, float64, no gradient.
    Invalid entries are -inf in relative. A pool without mass (every valid w is 0) is -inf throughout with log_top 0.
    """
    valid_BM = resolve_valid(log_w_BM, valid_BM)
    masked_BM = torch.where(valid_BM, log_w_BM.detach().double(), -torch.inf)
    log_top_B1 = masked_BM.amax(dim=1, keepdim=True)
    log_top_B1 = torch.where(log_top_B1 == -torch.inf, 0.0, log_top_B1)
    return masked_BM - log_top_B1, log_top_B1, valid_BM


def has_mass(relative_BM: torch.Tensor) -> torch.Tensor:
    """[B, 1] bool: some weight of the pool is not zero. NaN counts as mass, so that it surfaces as NaN downstream."""
    return ~(relative_BM == -torch.inf).all(dim=1, keepdim=True)


def prompt_mean_scale(valid_BM: torch.Tensor, minimum: int, *, num_resamples: int | None = None) -> torch.Tensor:
    """The factor (1/B)(1/M_b) of the surrogate loss, [B], float64, without gradient.

    valid_BM is the whole step's table, every data-parallel rank's prompts included: the denominator is global, never a
    local mean. A prompt with fewer than `minimum` valid rationales (2 with a leave-one-out baseline, 1 for PAFT) leaves
    the batch: its scale is exactly 0 and B counts the rest. With `num_resamples` (PAFT) the inner mean is over K draws:
    (1/B)(1/K). All zeros when no prompt is left.
    """
    assert minimum >= 1, "a prompt without rationales cannot be kept"
    count_B = valid_BM.sum(dim=1)
    kept_B = count_B >= minimum
    inner_B = count_B.double() if num_resamples is None else torch.full_like(count_B, num_resamples).double()
    return torch.where(kept_B, 1.0 / (kept_B.sum() * inner_B), 0.0)
