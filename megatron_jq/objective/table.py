"""The step's table: everything that a step knows of its rationales before any power is taken."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTable:
    """One entry per prompt b and rationale m of the whole step, alike on every rank; float64, nats, [B, M].

    log_w_BM: ln p_θ(y*|x,z). log_z_BM: ln p_θ(z|x) by the trainer, over the tokens that were sampled. log_mu_BM: ln of
    the distribution that z was drawn from, over the same tokens. reward_BM: of the sampled answer. None: this step does
    not know it. valid_BM: bool; a rationale that failed is False and leaves M (it is not a rationale with w = 0).
    """

    log_w_BM: torch.Tensor | None
    valid_BM: torch.Tensor
    log_z_BM: torch.Tensor | None = None
    log_mu_BM: torch.Tensor | None = None
    reward_BM: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, M)."""
        return tuple(self.valid_BM.shape)
