"""F3: RMSNorm for Megatron-core's local layer spec, aware of sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under the constructor that Megatron-core's specs call.

    Its weight carries `sequence_parallel`, so that Megatron-core sums the weight's gradient over tensor-parallel ranks
    that each saw a share of the sequence; Megatron-core's own WrappedTorchNorm refuses that case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
