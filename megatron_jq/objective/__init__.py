"""F0: the objective. Pure functions from ln w to coefficients, in torch and the standard library alone.

Nothing here knows of processes, models or configuration. One equation, one function, one citation.
"""

from megatron_jq.objective.baselines import (
    grpo_coefficients,
    maxrl_coefficients,
    rloo_coefficients,
    sft_coefficients,
    star_coefficients,
)
from megatron_jq.objective.clipping import (
    TokenFigures,
    TokenRule,
    clipped_coefficients,
    clipped_surrogate,
    clipped_tokens,
    reference_kl,
    reference_kl_coefficients,
)
from megatron_jq.objective.garl import effective_reward_max, garl_coefficients, garl_plug_in_coefficients
from megatron_jq.objective.metrics import effective_sample_size, majority_at_k, pass_at_k
from megatron_jq.objective.paft import paft_attenuation, paft_coefficients, resample_counts
from megatron_jq.objective.schedule import QSchedule, q_at
from megatron_jq.objective.table import StepTable
from megatron_jq.objective.tsallis import (
    check_q,
    jq_loss,
    log_amplification,
    log_attenuation,
    log_mean_weight,
    log_q,
    prompt_mean_scale,
)

__all__ = [
    "QSchedule",
    "StepTable",
    "TokenFigures",
    "TokenRule",
    "check_q",
    "clipped_coefficients",
    "clipped_surrogate",
    "clipped_tokens",
    "effective_reward_max",
    "effective_sample_size",
    "garl_coefficients",
    "garl_plug_in_coefficients",
    "grpo_coefficients",
    "jq_loss",
    "log_amplification",
    "log_attenuation",
    "log_mean_weight",
    "log_q",
    "majority_at_k",
    "maxrl_coefficients",
    "paft_attenuation",
    "paft_coefficients",
    "pass_at_k",
    "prompt_mean_scale",
    "q_at",
    "reference_kl",
    "reference_kl_coefficients",
    "resample_counts",
    "rloo_coefficients",
    "sft_coefficients",
    "star_coefficients",
]
