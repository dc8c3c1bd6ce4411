"""F3: core attention over packed rows, on CPU and CUDA alike, through torch's kernels (flash.py).

A micro-batch is one row of T tokens, segment after segment. Megatron-core carries a `PackedSeqParams` from the model's
entry down to the core attention and looks at nothing in it but `qkv_format`; our plans are such records, and say which
token attends to which. qkv_format "sbhd" keeps Megatron-core from re-deriving positions out of segment lengths.

Axes: T tokens, h query heads, g key/value groups (h a multiple of g), d channels a head; heads are this tensor-parallel
rank's share.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_jq.model.flash import causal_attention
from megatron_jq.parallel.transfers import to_device


class AttentionPlan(PackedSeqParams):
    """Which token attends to which. `attend` maps q [T, h, d], k and v [T, g, d] to [T, h, d]."""

    def __init__(self):
        super().__init__(qkv_format="sbhd")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        raise NotImplementedError  # abstract: the plans below


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar length, attended to as one padded batch."""

    token_nS: Tensor  # index into the row; entries beyond a segment's end repeat its last token and are never read


class CausalSegments(AttentionPlan):
    """Every token attends to itself and to what stands before it in its own segment (block-diagonal causal).

    lengths: tokens of each segment; they fill the row from its start. Attention is computed bucket by bucket so that
    short segments are not padded to the longest; equal lengths need no copy at all.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        super().__init__()
        self.lengths = lengths
        self.equal = len(set(lengths)) <= 1
        if not self.equal:
            self._make_buckets(device)

    def _make_buckets(self, device: torch.device) -> None:
        starts = [0, *itertools.accumulate(self.lengths)]
        self.buckets: list[_Bucket] = []
        place_T = torch.empty(starts[-1], dtype=torch.long)  # where each token of the row lies in the buckets' output
        offset = 0
        for group in similar_lengths(self.lengths):
            longest = self.lengths[group[0]]
            token_nS = torch.empty(len(group), longest, dtype=torch.long)
            for row, i in enumerate(group):
                ids = torch.arange(starts[i], starts[i + 1])
                token_nS[row, : len(ids)] = ids
                token_nS[row, len(ids) :] = ids[-1]
                place_T[ids] = offset + row * longest + torch.arange(len(ids))
            offset += token_nS.numel()
            self.buckets.append(_Bucket(to_device(token_nS, device)))
        self.place_T = to_device(place_T, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.equal:
            shape = (max(len(self.lengths), 1), -1)
            output = causal_attention(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), scale)
            return output.flatten(0, 1)
        tokens = [bucket.token_nS for bucket in self.buckets]
        outputs = [causal_attention(q[token], k[token], v[token], scale).flatten(0, 1) for token in tokens]
        return torch.cat(outputs)[self.place_T]


#: The shortest of the lengths that are padded to one length is at least this share of the longest: bounds the padded
#: work at 1/share^2.
FILL = 0.75


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Indices of the lengths above 0, longest first, in groups to be padded to their first one's."""
    groups: list[list[int]] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i])[::-1]:
        if groups and lengths[i] >= FILL * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class PlannedAttention(MegatronModule):
    """Core attention for Megatron-core's SelfAttention: it handles shapes, the plan everything else.

    query [T, 1, h, d], key and value [T, 1, g, d] → [T, 1, h·d]. Raises AssertionError without a plan: a bug of
    ours, never the user's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: Any,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert isinstance(packed_seq_params, AttentionPlan) and query.shape[1] == 1
        output = packed_seq_params.attend(
            self.layer_number, query.squeeze(1), key.squeeze(1), value.squeeze(1), self.scale
        )
        return output.reshape(output.shape[0], 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}
