"""F4: the live policy's weights under Hugging Face names, one tensor after another, from any layout.

For an inference engine, or to look at a policy without writing it. The ranks tell each other once which shards they
hold; then each tensor travels from the ranks that hold its rows, in one message each, to the rank that asked for it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.shards import parameter_shards
from megatron_jq.model.hf import HuggingFaceTensor, Slab, hugging_face_tensors
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime


@dataclass(frozen=True)
class _RankShard:
    """Where a rank's shard begins in its slab; `number` is its place in that rank's list."""

    rank: int
    number: int
    slab: Slab
    at: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _RowTransfer:
    """Rows [start, stop) of a shard, and the tensor's row at which they begin; columns are the shard's."""

    source: _RankShard
    start: int
    stop: int
    to: int

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        return shard[self.start : self.stop]

    def into(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor[self.to : self.to + self.stop - self.start]
        if rows.dim() == 1:
            return rows
        return rows[:, self.source.at[1] : self.source.at[1] + self.source.shape[1]]


@torch.no_grad()
def export_hf_tensors(
    policies: list[Policy], runtime: Runtime, architecture: Architecture, *, everywhere: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every tensor of the Hugging Face checkpoint, in the model's order, in the weights' dtype.

    policies: this pipeline rank's model chunks. Every rank must iterate to the end, at the same time; rank 0 gets the
    tensors, or all ranks with `everywhere`; the others get nothing. A tensor is the receiver's own, on the runtime's
    device; memory is one tensor and one message. Experts, layers and vocabulary padding are where the layout put them.
    """
    architecture = replace(architecture, vocab_size=policies[0].true_vocab_size)
    local_tensors, all_shards = _rank_shards(policies, runtime)
    shards_of_slab: dict[Slab, list[_RankShard]] = {}
    for shard in all_shards:
        shards_of_slab.setdefault(shard.slab, []).append(shard)
    receives = everywhere or runtime.is_main
    for tensor in hugging_face_tensors(architecture):
        transfers = _transfers(tensor, shards_of_slab)
        target = torch.empty(tensor.shape, dtype=transfers[0].source.dtype, device=runtime.device)
        for rank in sorted({transfer.source.rank for transfer in transfers}):
            of_rank = [transfer for transfer in transfers if transfer.source.rank == rank]
            _deliver(of_rank, rank, local_tensors, target, runtime, everywhere)
        if receives:
            yield tensor.name, target


def _rank_shards(policies: list[Policy], runtime: Runtime) -> tuple[list[torch.Tensor], list[_RankShard]]:
    """This rank's shards as tensors, and a description of all ranks' shards. Of copies, one rank's are listed."""
    local: list[_RankShard] = []
    tensors: list[torch.Tensor] = []
    for shards in parameter_shards(policies, runtime).values():
        for shard in shards:
            sharded = shard.sharded
            if any(sharded.replica_id):
                continue
            lead = sharded.prepend_axis_num
            slab = Slab(sharded.key, tuple(sharded.global_offset[:lead]))
            at = tuple(sharded.global_offset[lead:])
            data = sharded.data.detach()
            local.append(_RankShard(runtime.rank, len(tensors), slab, at, tuple(data.shape), data.dtype))
            tensors.append(data)
    by_rank: list[list[_RankShard]] = [[]] * runtime.world_size
    dist.all_gather_object(by_rank, local, group=runtime.groups.world)
    return tensors, [shard for shards in by_rank for shard in shards]


def _transfers(tensor: HuggingFaceTensor, shards_of_slab: dict[Slab, list[_RankShard]]) -> list[_RowTransfer]:
    transfers = []
    for span in tensor.spans:
        for shard in shards_of_slab[span.slab]:
            first = shard.at[0]
            start = max(span.at, first)
            stop = min(span.at + span.count, first + shard.shape[0])
            if start < stop:
                transfers.append(_RowTransfer(shard, start - first, stop - first, span.start + start - span.at))
    covered = sum((rows.stop - rows.start) * math.prod(rows.source.shape[1:]) for rows in transfers)
    assert covered == math.prod(tensor.shape), f"the ranks' shards do not fill {tensor.name}"
    return transfers


def _deliver(
    transfers: list[_RowTransfer],
    rank: int,
    local_tensors: list[torch.Tensor],
    target: torch.Tensor,
    runtime: Runtime,
    everywhere: bool,
) -> None:
    """Fill `target` with the rows that one rank has, on rank 0 or on all ranks, by at most one message."""
    sends, receives, world = runtime.rank == rank, everywhere or runtime.is_main, runtime.groups.world
    if sends:
        message = torch.cat([rows.of(local_tensors[rows.source.number]).reshape(-1) for rows in transfers])
    elif receives:
        message = target.new_empty(sum(rows.into(target).numel() for rows in transfers))
    else:
        return
    if everywhere:
        dist.broadcast(message, src=rank, group=world)
    elif not receives:
        dist.send(message, dst=0, group=world)
    elif not sends:
        dist.recv(message, src=rank, group=world)
    if receives:
        sizes = [rows.into(target).numel() for rows in transfers]
        for transfer, values in zip(transfers, message.split(sizes), strict=True):
            rows = transfer.into(target)
            rows.copy_(values.view(rows.shape))
