"""F4: the live policy's weights under Hugging Face names, one tensor after another, from any layout.

For an inference engine, or to look at a policy without writing it. The ranks tell each other once which boxes they
hold; then each tensor travels from the ranks that hold its rows, in one message each, to the rank that asked for it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.shards import pieces
from megatron_jq.model.hf import HuggingFaceTensor, Slab, hugging_face_tensors
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime


@dataclass(frozen=True)
class _Held:
    """Where a rank's box begins in its slab; `number` is its place in that rank's list."""

    rank: int
    number: int
    slab: Slab
    at: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Part:
    """Rows [start, stop) of a box, and the row of the tensor from which they go; the box's columns are the tensor's."""

    held: _Held
    start: int
    stop: int
    to: int

    def of(self, box: torch.Tensor) -> torch.Tensor:
        return box[self.start : self.stop]

    def into(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor[self.to : self.to + self.stop - self.start]
        if rows.dim() == 1:
            return rows
        return rows[:, self.held.at[1] : self.held.at[1] + self.held.shape[1]]


@torch.no_grad()
def export_hf_tensors(
    policies: list[Policy], runtime: Runtime, architecture: Architecture, *, everywhere: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor of the Hugging Face checkpoint, in the model's order, in the weights' dtype.

    policies: this pipeline rank's model chunks. Every rank must iterate to the end, at the same time; rank 0 gets the
    tensors, or all ranks with `everywhere`; the others get nothing. A tensor is the receiver's own, on the runtime's
    device; memory is one tensor and one message. Experts, layers and vocabulary padding are where the layout put them.
    """
    architecture = replace(architecture, vocab_size=policies[0].true_vocab_size)
    boxes, everyones = _boxes(policies, runtime)
    held: dict[Slab, list[_Held]] = {}
    for box in everyones:
        held.setdefault(box.slab, []).append(box)
    receives = everywhere or runtime.is_main
    for tensor in hugging_face_tensors(architecture):
        parts = _parts(tensor, held)
        target = torch.empty(tensor.shape, dtype=parts[0].held.dtype, device=runtime.device)
        for rank in sorted({part.held.rank for part in parts}):
            theirs = [part for part in parts if part.held.rank == rank]
            _deliver(theirs, rank, boxes, target, runtime, everywhere)
        if receives:
            yield tensor.name, target


def _boxes(policies: list[Policy], runtime: Runtime) -> tuple[list[torch.Tensor], list[_Held]]:
    """This rank's boxes, and what is known of all ranks' boxes. Of copies, one rank's are listed."""
    mine, tensors = [], []
    for some in pieces(policies, runtime).values():
        for piece in some:
            sharded = piece.sharded
            if any(sharded.replica_id):
                continue
            lead = sharded.prepend_axis_num
            slab = Slab(sharded.key, tuple(sharded.global_offset[:lead]))
            at = tuple(sharded.global_offset[lead:])
            mine.append(_Held(runtime.rank, len(tensors), slab, at, tuple(sharded.data.shape), sharded.data.dtype))
            tensors.append(sharded.data.detach())
    everyones: list[list[_Held]] = [[]] * runtime.world_size
    dist.all_gather_object(everyones, mine, group=runtime.groups.world)
    return tensors, [box for boxes in everyones for box in boxes]


def _parts(tensor: HuggingFaceTensor, held: dict[Slab, list[_Held]]) -> list[_Part]:
    parts = []
    for span in tensor.spans:
        for box in held[span.slab]:
            start = max(span.at, box.at[0])
            stop = min(span.at + span.count, box.at[0] + box.shape[0])
            if start < stop:
                parts.append(_Part(box, start - box.at[0], stop - box.at[0], span.start + start - span.at))
    covered = sum((part.stop - part.start) * math.prod(part.held.shape[1:]) for part in parts)
    assert covered == math.prod(tensor.shape), f"the ranks' boxes do not fill {tensor.name}"
    return parts


def _deliver(
    parts: list[_Part], rank: int, boxes: list[torch.Tensor], target: torch.Tensor, runtime: Runtime, everywhere: bool
) -> None:
    """Fill `target` with the parts that one rank holds, on rank 0 or on all ranks, by at most one message."""
    sends, receives, world = runtime.rank == rank, everywhere or runtime.is_main, runtime.groups.world
    if sends:
        message = torch.cat([part.of(boxes[part.held.number]).reshape(-1) for part in parts])
    elif receives:
        message = target.new_empty(sum(part.into(target).numel() for part in parts))
    else:
        return
    if everywhere:
        dist.broadcast(message, src=rank, group=world)
    elif not receives:
        dist.send(message, dst=0, group=world)
    elif not sends:
        dist.recv(message, src=rank, group=world)
    if receives:
        sizes = [part.into(target).numel() for part in parts]
        for part, values in zip(parts, message.split(sizes), strict=True):
            rows = part.into(target)
            rows.copy_(values.view(rows.shape))
