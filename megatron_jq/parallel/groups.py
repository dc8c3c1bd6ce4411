"""F2: the process groups of one layout, made once and passed on as arguments.

The only file that reads Megatron-core's global parallel state. Ranks are laid out tensor-parallel first, then data-,
then pipeline-parallel ("tp-cp-ep-dp-pp"), so that tensor-parallel peers share a node.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class ParallelGroups:
    """The tp, pp, dp and world groups, Megatron-core's own collection of them, and this rank's place in each."""

    collection: ProcessGroupCollection
    world: dist.ProcessGroup

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def expert_peers(self) -> dist.ProcessGroup | None:
        """The ranks that hold one copy of the experts between them, where they belong to several replicas, else None.

        Tokens travel within it in every pass, so its replicas must make the same number of passes, idle or not.
        """
        peers = self.collection.tp_ep
        return peers if peers.size() > self.tp.size() else None

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def previous_stage(self) -> int:
        """Global rank of the pipeline neighbour that sends this rank its activations; stages form a ring."""
        return dist.get_global_rank(self.pp, (self.pp.rank() - 1) % self.pp.size())

    @property
    def next_stage(self) -> int:
        return dist.get_global_rank(self.pp, (self.pp.rank() + 1) % self.pp.size())

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every stage the last stage's values, in place. One broadcast over the pipeline group."""
        if self.pp.size() > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(self.pp, self.pp.size() - 1), group=self.pp)
        return tensor

    def sum_over_replicas(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel replicas, in place. One all-reduce over the data-parallel group."""
        if self.dp.size() > 1:
            dist.all_reduce(tensor, group=self.dp)
        return tensor


def build_groups(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    timeout: timedelta,
    *,
    virtual_stages: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
) -> ParallelGroups:
    """Make Megatron-core's groups for this layout and seed nothing. Every rank calls it, once a process.

    The deadline applies to every collective of every group.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=dist.get_backend() != "gloo",  # on gloo the main groups are gloo already
    )
    world = dist.group.WORLD
    assert world is not None, "init_process_group comes first"
    return ParallelGroups(ProcessGroupCollection.use_mpu_process_groups(), world)


def destroy_groups() -> None:
    parallel_state.destroy_model_parallel()
