"""F2: collectives whose name depends on the version of torch."""

import torch
import torch.distributed as dist


def all_gather_flat(
    output: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """Gather every rank's `local`, in rank order along the first dimension, into `output`."""
    # torch 2.13 calls it all_gather_single and warns about the old name; before, the new one does not exist.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, local, group=group, async_op=async_op)
