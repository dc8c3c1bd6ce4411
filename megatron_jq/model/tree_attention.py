"""F3: attention over rows of trees: a trunk (a prompt) is computed once for all its branches (rationales and answers).

A token of a branch attends to its trunk and, causally, to its own branch; branches do not see each other. Nothing that
is masked is computed: branch tokens meet the trunk's keys in one dense product over all branches, and their own branch
in a causal one, and the two are merged by their log-sum-exp, as ring attention merges blocks (Liu et al. 2023,
arXiv:2310.01889). Backward, each product is a flash backward with the merged output and log-sum-exp, which is exact.

Axes as in attention.py; b segments of a block, s tokens of each, padding included.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_jq.model.attention import AttentionPlan, similar_lengths
from megatron_jq.model.flash import flash, flash_backward
from megatron_jq.parallel.transfers import to_device


@dataclass(frozen=True)
class Tree:
    """Tokens of a trunk and of each of its branches; a sequence by itself is a trunk without branches."""

    trunk: int
    branches: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.trunk + sum(self.branches)


@dataclass(frozen=True)
class _PaddedTokens:
    """Where the tokens of a padded batch lie in the row, flat. Real tokens are those that are not padding."""

    token_bs: Tensor  # index into the row; after a segment's end its last token again
    real_bs: Tensor  # bool
    # The same as indices, for a boolean one would have the host wait for the device.
    real_index: Tensor  # of token_bs
    real_token: Tensor  # of the row


@dataclass(frozen=True)
class _Block:
    """Segments of similar length as one padded batch. padded None: they are equal and stand side by side."""

    segments: int
    length: int
    row_slice: slice  # of the row, where they stand side by side
    padded: "_PaddedTokens | None" = None

    def take(self, x_T: Tensor) -> Tensor:
        rows = x_T[self.row_slice] if self.padded is None else x_T[self.padded.token_bs]
        return rows.unflatten(0, (self.segments, self.length))

    def put(self, x_T: Tensor, block: Tensor) -> None:
        if self.padded is None:
            x_T[self.row_slice] = block.flatten(0, 1)
        else:
            x_T[self.padded.real_token] = block.flatten(0, 1)[self.padded.real_index]

    def without_padding(self, block: Tensor) -> Tensor:
        if self.padded is None:
            return block
        return block.flatten(0, 1).masked_fill(~self.padded.real_bs[:, None, None], 0).view_as(block)


def _blocks(lengths: list[int], start: int, device: torch.device) -> list[_Block]:
    """Blocks of segments that follow one another from token `start` on."""
    present = [length for length in lengths if length]
    if len(set(present)) == 1:
        return [_Block(len(present), present[0], slice(start, start + sum(present)))]
    starts, blocks = [start, *itertools.accumulate(lengths, initial=start)][1:], []
    for group in similar_lengths(lengths):
        longest = lengths[group[0]]
        first_b = torch.tensor([starts[i] for i in group])[:, None]
        length_b = torch.tensor([lengths[i] for i in group])[:, None]
        place_s = torch.arange(longest)[None]
        token_bs = first_b + torch.minimum(place_s, length_b - 1)
        real_bs = (place_s < length_b).flatten()
        token_bs = token_bs.flatten()
        index = real_bs.nonzero().squeeze(1)
        tensors = [to_device(tensor, device) for tensor in (token_bs, real_bs, index, token_bs[index])]
        blocks.append(_Block(len(group), longest, slice(0), _PaddedTokens(*tensors)))
    return blocks


class TreeSegments(AttentionPlan):
    """The plan of a row of trees: first every trunk, then every tree's branches, in the trees' order.

    Trunks and branches fill the row without gaps.
    """

    def __init__(self, trees: list[Tree], device: torch.device):
        super().__init__()
        self.trunk_tokens = sum(tree.trunk for tree in trees)
        branches = [length for tree in trees for length in tree.branches]
        self.causal = [
            *_blocks([tree.trunk for tree in trees], 0, device),
            *_blocks(branches, self.trunk_tokens, device),
        ]
        self.dense: list[tuple[slice, slice]] = []  # (a tree's branch tokens, its trunk's)
        trunk, branch = 0, self.trunk_tokens
        for tree in trees:
            grown = sum(tree.branches)
            if grown and tree.trunk:  # the kernels divide by the number of keys
                self.dense.append((slice(branch, branch + grown), slice(trunk, trunk + tree.trunk)))
            trunk, branch = trunk + tree.trunk, branch + grown

    @property
    def attended(self) -> int:
        """Pairs of a query and a key that are computed, padding of ragged segments included, masked ones not."""
        causal = sum(block.segments * block.length * (block.length + 1) // 2 for block in self.causal)
        return causal + sum((q.stop - q.start) * (k.stop - k.start) for q, k in self.dense)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _TreeAttention.apply(q, k, v, self, scale)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TreeSegments, scale: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        extras = []
        for block in plan.causal:
            block_out, block_lse, extra = flash(block.take(q), block.take(k), block.take(v), causal=True, scale=scale)
            block.put(out, block_out)
            block.put(lse, block_lse)
            extras.append(extra)
        for queries, keys in plan.dense:
            trunk_out, trunk_lse, extra = flash(
                q[queries][None], k[keys][None], v[keys][None], causal=False, scale=scale
            )
            _merge(out[queries], lse[queries], trunk_out[0], trunk_lse[0])
            extras.append(extra)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.extras = plan, scale, extras
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        extras, scale = iter(ctx.extras), ctx.scale
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for block in ctx.plan.causal:  # every token is in one of them
            bq, bk, bv, block_out, block_lse = (block.take(x) for x in (q, k, v, out, lse))
            upstream = block.without_padding(block.take(grad))
            extra = next(extras)
            gradients = flash_backward(upstream, bq, bk, bv, block_out, block_lse, extra, causal=True, scale=scale)
            for total, gradient in zip((dq, dk, dv), gradients, strict=True):
                block.put(total, gradient)
        for queries, keys in ctx.plan.dense:
            upstream, bq, trunk_out, trunk_lse = (x[queries][None] for x in (grad, q, out, lse))
            extra = next(extras)
            gradients = flash_backward(
                upstream, bq, k[keys][None], v[keys][None], trunk_out, trunk_lse, extra, causal=False, scale=scale
            )
            for total, tokens, gradient in zip((dq, dk, dv), (queries, keys, keys), gradients, strict=True):
                total[tokens] += gradient[0]
        return dq, dk, dv, None, None


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Two softmax averages over disjoint keys → one over both, in place of the first. [s, h, d], [s, h]."""
    both = torch.logaddexp(lse, other_lse)
    share = (other_lse - both).exp().to(out.dtype)[..., None]
    out.lerp_(other, share)
    lse.copy_(both)
