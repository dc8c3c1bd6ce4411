"""F4: from the step's [B, M] tables to the coefficients of the surrogate loss, for every estimator by name."""

from dataclasses import dataclass

import torch

from megatron_jq.config import GIVEN_RATIONALES
from megatron_jq.config_estimators import LEAVE_ONE_OUT, SAMPLES_ANSWERS
from megatron_jq.objective.baselines import (
    grpo_coefficients,
    maxrl_coefficients,
    rloo_coefficients,
    sft_coefficients,
    star_coefficients,
)
from megatron_jq.objective.garl import effective_reward_max, garl_coefficients
from megatron_jq.objective.paft import paft_coefficients
from megatron_jq.objective.tsallis import prompt_mean_scale
from megatron_jq.records import Coefficients
from megatron_jq.seeds import stream

_BASELINES = {
    "grpo": grpo_coefficients,
    "rloo": rloo_coefficients,
    "maxrl": maxrl_coefficients,
    "star": star_coefficients,
}


@dataclass(frozen=True)
class Estimator:
    """An estimator and its constants.

    num_resamples: PAFT's K. normalize: the factor 1/M^q of GARL and PAFT. row_tokens: scored tokens of a row of
    pretraining (mean of a step's rows), whose loss is a mean over tokens; 1 elsewhere.
    """

    name: str
    num_resamples: int
    normalize: bool
    seed: int
    row_tokens: float = 1

    @property
    def samples_answers(self) -> bool:
        """Whether the trained answer is a sampled one with a reward (GRPO, RLOO, MaxRL, STaR), not the gold one."""
        return self.name in SAMPLES_ANSWERS

    @property
    def imitates(self) -> bool:
        """Whether the rationale is given (SFT) or empty (pretraining): none is drawn, and coefficients need no ln w."""
        return self.name in GIVEN_RATIONALES

    @property
    def uses_q(self) -> bool:
        return not (self.samples_answers or self.imitates)

    @property
    def minimum_rationales(self) -> int:
        """Fewest valid rationales with which a prompt stays: leave-one-out and group baselines need two."""
        return 2 if self.name in LEAVE_ONE_OUT else 1

    def coefficients(
        self, log_w_BM: torch.Tensor, reward_BM: torch.Tensor, valid_BM: torch.Tensor, *, q: float, step: int
    ) -> Coefficients:
        """Constants divided by B and M_b (or K), a pure function of its arguments, so alike on every rank.

        log_w_BM: ln p(y*|x,z), [B, M], nats, the whole step's table. reward_BM: 1 where the sampled answer matches;
        read by GRPO, RLOO, MaxRL and STaR alone. PAFT draws from a stream keyed by (seed, step). SFT and
        pretraining read valid_BM alone.
        """
        resamples = self.num_resamples if self.name == "paft" else None
        scale_B1 = prompt_mean_scale(valid_BM, self.minimum_rationales, num_resamples=resamples)[:, None]
        if self.name == "paft":
            generator = stream("PAFT's draws", self.seed, step)
            joint_BM = paft_coefficients(
                log_w_BM, q, self.num_resamples, generator=generator, normalize=self.normalize, valid_BM=valid_BM
            )
            return Coefficients(joint_BM * scale_B1, joint_BM * scale_B1)
        if self.imitates:
            rationale_BM, answer_BM = sft_coefficients(valid_BM, rationale_given=True)
            scale_B1 = scale_B1 / self.row_tokens
        elif self.name == "garl":
            rationale_BM, answer_BM = garl_coefficients(log_w_BM, q, normalize=self.normalize, valid_BM=valid_BM)
        else:
            rationale_BM, answer_BM = _BASELINES[self.name](reward_BM, valid_BM)
        return Coefficients(rationale_BM * scale_B1, answer_BM * scale_B1)

    def kl_weights(self, valid_BM: torch.Tensor, beta: float) -> torch.Tensor:
        """beta/(B·M_b) for each token of a sequence that is in the batch, float64 [B, M], 0 elsewhere."""
        return beta * prompt_mean_scale(valid_BM, self.minimum_rationales)[:, None] * valid_BM

    def effective_reward_max(
        self, log_w_BM: torch.Tensor, coefficients: Coefficients, valid_BM: torch.Tensor, q: float
    ) -> float:
        """The largest factor on a rationale's score: max c_m / M^q for GARL (Figure 3), its like for the others."""
        if not valid_BM.any():
            return 0.0
        if self.name == "garl":
            return effective_reward_max(log_w_BM, q, valid_BM).max().item()
        scale_B1 = prompt_mean_scale(valid_BM, self.minimum_rationales)[:, None]
        factor_BM = (coefficients.rationale_BM / scale_B1).nan_to_num(0.0)  # 0 / 0: a prompt that left the batch
        return factor_BM.max().item()
