"""GRPO's objective per token, for updates after the first on one rollout: the clipped ratio, and the KL to a reference.

To be maximised, for a scored token t (Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4):

    min(r·A, clip(r, 1-lower, 1+upper)·A) - beta·(exp(d) - d - 1),    r = p / p_old,    d = ln p_ref - ln p

p_old is the policy at the first update. All functions take ln p in nats, [T] of any float dtype, and are elementwise;
`*_coefficients` are derivatives by ln p, so that coefficient · grad ln p is the gradient. Nothing is clamped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def clipped_surrogate(log_prob_T: Tensor, old_T: Tensor, advantage_T: Tensor, lower: float, upper: float) -> Tensor:
    """min(r·A, clip(r, 1-lower, 1+upper)·A) (Schulman et al. 2017, arXiv:1707.06347, eq. 7; with two bounds in DAPO,
    arXiv:2503.14476)."""
    ratio_T = (log_prob_T - old_T).exp()
    return torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1.0 - lower, 1.0 + upper) * advantage_T)


def clipped_tokens(log_prob_T: Tensor, old_T: Tensor, advantage_T: Tensor, lower: float, upper: float) -> Tensor:
    """Where the surrogate is flat: the ratio has passed the bound on the side that the advantage favours. bool [T]."""
    ratio_T = (log_prob_T - old_T).exp()
    return ((advantage_T > 0) & (ratio_T > 1.0 + upper)) | ((advantage_T < 0) & (ratio_T < 1.0 - lower))


def clipped_coefficients(log_prob_T: Tensor, old_T: Tensor, advantage_T: Tensor, lower: float, upper: float) -> Tensor:
    """d clipped_surrogate / d ln p = r·A, and 0 where clipped. On the policy that sampled, A."""
    flat_T = clipped_tokens(log_prob_T, old_T, advantage_T, lower, upper)
    return torch.where(flat_T, 0.0, (log_prob_T - old_T).exp() * advantage_T)


def reference_kl(log_prob_T: Tensor, reference_T: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ln p_ref - ln p: never negative, and KL(p || p_ref) in expectation over tokens of p
    (arXiv:2402.03300, eq. 4; k3 in Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    gap_T = reference_T - log_prob_T
    return gap_T.expm1() - gap_T


def reference_kl_coefficients(log_prob_T: Tensor, reference_T: Tensor) -> Tensor:
    """d reference_kl / d ln p = 1 - exp(d). Exactly 0 where both policies agree."""
    return -(reference_T - log_prob_T).expm1()


@dataclass(frozen=True)
class TokenRule:
    """A loss that is no constant times ln p: its value, and the coefficient of ln p, once ln p is known.

    Its methods take loss coefficients, c_T = -A with all denominators: the loss is -clipped_surrogate + weight ·
    reference_kl. old_T None: the first update, where the ratio is 1. reference_T None: no KL. kl_weight_T: beta with
    denominators. All [T], without gradient.
    """

    lower: float
    upper: float
    old_T: Tensor | None = None
    reference_T: Tensor | None = None
    kl_weight_T: Tensor | None = None

    def part(self, index: slice | Tensor) -> "TokenRule":
        """The rule of some of its tokens."""
        tensors = (self.old_T, self.reference_T, self.kl_weight_T)
        return TokenRule(self.lower, self.upper, *(None if each is None else each[index] for each in tensors))

    def loss(self, coefficient_T: Tensor, log_prob_T: Tensor) -> Tensor:
        """The sum over tokens, float64; of the first update coefficient · ln p, which has the same gradient."""
        log_prob_T, coefficient_T = log_prob_T.double(), coefficient_T.double()
        if self.old_T is None:
            loss_T = coefficient_T * log_prob_T
        else:
            loss_T = -clipped_surrogate(log_prob_T, self.old_T.double(), -coefficient_T, self.lower, self.upper)
        if self.reference_T is not None:
            loss_T = loss_T + self.kl_weight_T * reference_kl(log_prob_T, self.reference_T.double())
        return loss_T.sum()

    def coefficients(self, coefficient_T: Tensor, log_prob_T: Tensor) -> Tensor:
        """d loss / d ln p, float64."""
        log_prob_T, found_T = log_prob_T.double(), coefficient_T.double()
        if self.old_T is not None:
            found_T = -clipped_coefficients(log_prob_T, self.old_T.double(), -found_T, self.lower, self.upper)
        if self.reference_T is not None:
            found_T = found_T + self.kl_weight_T * reference_kl_coefficients(log_prob_T, self.reference_T.double())
        return found_T

    def figures(self, coefficient_T: Tensor, log_prob_T: Tensor) -> Tensor:
        """Sums over tokens, float64, in the order of TokenFigures."""
        log_prob_T, coefficient_T = log_prob_T.double(), coefficient_T.double()
        zero_T = torch.zeros_like(log_prob_T)
        clipped_T, kl_T, weight_T = zero_T, zero_T, zero_T
        if self.old_T is not None:
            clipped_T = clipped_tokens(log_prob_T, self.old_T.double(), -coefficient_T, self.lower, self.upper)
        if self.reference_T is not None:
            weight_T = self.kl_weight_T
            kl_T = reference_kl(log_prob_T, self.reference_T.double()) * (weight_T != 0)
        sums = (clipped_T, coefficient_T != 0, kl_T, weight_T != 0, weight_T * kl_T)
        return torch.stack([each.double().sum() for each in sums])


@dataclass(frozen=True)
class TokenFigures:
    """What TokenRule.figures summed over an update's tokens, and what follows from it."""

    clipped: float  # tokens whose surrogate is flat
    with_advantage: float  # tokens with an advantage, clipped or not
    kl_sum: float  # of reference_kl in nats, over the tokens that the penalty weighs
    with_kl: float  # those tokens
    kl_loss: float  # the penalty, beta and denominators included

    @property
    def clipped_fraction(self) -> float:
        return self.clipped / self.with_advantage if self.with_advantage else 0.0

    @property
    def kl_mean(self) -> float:
        """Nats a token."""
        return self.kl_sum / self.with_kl if self.with_kl else 0.0
