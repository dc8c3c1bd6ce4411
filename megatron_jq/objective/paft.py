"""PAFT, posterior-attenuated fine-tuning: resample towards the posterior, attenuate SFT (Algorithm 2, eq. 14).

The coefficients are constants (no gradient) of the surrogate loss
    -(1/B) sum_b (1/K) sum_m joint_bm · ln p(z_m, y*|x),        joint = attenuation × how often m was drawn.
Its scale is prompt_mean_scale(valid_BM, 1, num_resamples=K).
"""

from typing import Protocol

import torch

from megatron_jq.errors import UserError
from megatron_jq.objective.tsallis import centred_weights, check_q, has_mass


class _Random(Protocol):
    """numpy.random.Generator, as far as it is used here."""

    def random(self, size: tuple[int, ...]): ...


Generator = torch.Generator | _Random


def paft_attenuation(
    log_w_BM: torch.Tensor, q: float, *, normalize: bool = True, valid_BM: torch.Tensor | None = None
) -> torch.Tensor:
    """w̄^(1-q) (over M_b^q with normalize), the factor before the sum of (14), [B] float64.

    0 for a prompt with no valid rationale or without mass: there is no posterior to draw from.
    Raises UserError for q outside [0, 1].
    """
    check_q(q)
    relative_BM, log_top_B1, valid_BM = centred_weights(log_w_BM, valid_BM)
    log_count_B = valid_BM.sum(dim=1).double().log()
    log_mean_B = torch.logsumexp(relative_BM, dim=1) - log_count_B
    scale_B = torch.exp((1.0 - q) * log_top_B1[:, 0] - (q * log_count_B if normalize else 0.0))
    return torch.where(has_mass(relative_BM)[:, 0], scale_B * torch.exp((1.0 - q) * log_mean_B), 0.0)


def resample_counts(
    log_w_BM: torch.Tensor, num_resamples: int, *, generator: Generator, valid_BM: torch.Tensor | None = None
) -> torch.Tensor:
    """How often each rationale is drawn in K draws with replacement from Categorical(w_m / sum w), [B, M] float64.

    A pure function of the table and the generator's state: ranks that hold the same table and state draw alike. It
    always takes B·K uniforms from the generator, whatever the table holds, so later draws stay aligned too.
    A rationale with w = 0 and an invalid one are never drawn. A prompt without mass draws nothing: its row is 0.
    The CDF is inverted in float64 because torch.multinomial limits the number of categories and its stream of random
    numbers differs between devices. Raises UserError for K < 1.
    """
    if num_resamples < 1:
        raise UserError(f"PAFT needs at least one resample a prompt, got {num_resamples}")
    relative_BM, _, _ = centred_weights(log_w_BM, valid_BM)
    uniform_BK = _uniforms((relative_BM.shape[0], num_resamples), generator).to(relative_BM.device)
    cdf_BM = torch.exp(relative_BM).cumsum(dim=1)
    # u < 1 makes u·total < total in float64 too, so the first entry above it exists, and its own weight is not zero.
    index_BK = torch.searchsorted(cdf_BM, uniform_BK * cdf_BM[:, -1:], right=True)
    index_BK = index_BK.clamp(max=relative_BM.shape[1] - 1)  # only rows without mass reach past the end
    counts_BM = torch.zeros_like(relative_BM).scatter_add_(1, index_BK, torch.ones_like(uniform_BK))
    return torch.where(has_mass(relative_BM), counts_BM, 0.0)


def _uniforms(shape: tuple[int, int], generator: Generator) -> torch.Tensor:
    """Uniforms in [0, 1), float64. torch's CPU generator reads 32 bits of its seed, numpy's Philox all of its key."""
    if isinstance(generator, torch.Generator):
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=generator.device)
    return torch.from_numpy(generator.random(shape))


def paft_coefficients(
    log_w_BM: torch.Tensor,
    q: float,
    num_resamples: int,
    *,
    generator: Generator,
    normalize: bool = True,
    valid_BM: torch.Tensor | None = None,
) -> torch.Tensor:
    """PAFT's constant a rationale (Algorithm 2, eq. 14): joint_m = w̄^(1-q) · count_m, over M_b^q with normalize.

    log_w_BM: ln p(y*|x,z_m), [B, M], nats; num_resamples: K, the paper uses K = M. One constant weighs ln p(z|x) and
    ln p(y*|x,z) alike. Returns joint_BM, float64, without gradient; 1/K is the caller's (prompt_mean_scale).
    Given the pool its expectation over the draw is K/M_b times garl_plug_in_coefficients (Prop. D.3).
    Raises UserError for q outside [0, 1] or K < 1.
    """
    attenuation_B = paft_attenuation(log_w_BM, q, normalize=normalize, valid_BM=valid_BM)
    counts_BM = resample_counts(log_w_BM, num_resamples, generator=generator, valid_BM=valid_BM)
    return attenuation_B[:, None] * counts_BM
