"""Every estimator by one signature: f(table, knobs) → (rationale_BM, answer_BM), before the loss's denominators.

Which field of the table and which knob a function reads is declared in megatron_jq/estimators.py, a row each.
"""

import torch

from megatron_jq.objective.baselines import (
    grpo_coefficients,
    maxrl_coefficients,
    rloo_coefficients,
    sft_coefficients,
    star_coefficients,
)
from megatron_jq.objective.garl import effective_reward_max, garl_coefficients
from megatron_jq.objective.knobs import Knobs
from megatron_jq.objective.paft import paft_coefficients
from megatron_jq.objective.table import StepTable

TwoTables = tuple[torch.Tensor, torch.Tensor]


def garl(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return GARL's two constants (Algorithm 1, eq. 12)."""
    return garl_coefficients(table.log_w_BM, knobs.q, normalize=knobs.normalize, valid_BM=table.valid_BM)


def garl_effective_reward(table: StepTable, knobs: Knobs) -> torch.Tensor:
    """Return max c_m / M_b^q, [B] (Figure 3), with or without --normalize."""
    return effective_reward_max(table.log_w_BM, knobs.q, table.valid_BM)


def paft(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return PAFT's constant, for ln p(z|x) and ln p(y*|x,z) alike (Algorithm 2, eq. 14)."""
    joint_BM = paft_coefficients(
        table.log_w_BM, knobs.q, knobs.num_resamples,
        generator=knobs.generator, normalize=knobs.normalize, valid_BM=table.valid_BM,
    )  # fmt: skip
    return joint_BM, joint_BM


def grpo(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return GRPO's advantage, twice."""
    return grpo_coefficients(table.reward_BM, table.valid_BM)


def rloo(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return RLOO's advantage, twice."""
    return rloo_coefficients(table.reward_BM, table.valid_BM)


def maxrl(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return MaxRL's advantage, twice."""
    return maxrl_coefficients(table.reward_BM, table.valid_BM)


def star(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return STaR's weight, twice."""
    return star_coefficients(table.reward_BM, table.valid_BM)


def imitation(table: StepTable, knobs: Knobs) -> TwoTables:
    """Return 1 for the given rationale (or none) and for y*: SFT and pretraining."""
    return sft_coefficients(table.valid_BM, rationale_given=True)
