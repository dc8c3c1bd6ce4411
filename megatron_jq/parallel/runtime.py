"""F2: start and stop a process of the job. The one place that decides between CPU with gloo and CUDA with NCCL."""

import contextlib
import os
import random
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, overload

import numpy
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_jq.config import ParallelConfig
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.files import reason
from megatron_jq.parallel.groups import ParallelGroups, build_groups, destroy_groups
from megatron_jq.parallel.megatron import cpu, versions
from megatron_jq.seeds import short_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """This process's place in the job: rank, device, groups, and the contexts that Megatron-core's calls need."""

    rank: int
    world_size: int
    device: torch.device
    groups: ParallelGroups

    @property
    def is_main(self) -> bool:
        """Rank 0 prints, writes logs and draws."""
        return self.rank == 0

    def megatron(self) -> contextlib.AbstractContextManager:
        """Enter around Megatron-core's schedules, optimizer and constructors."""
        return contextlib.nullcontext() if self.device.type == "cuda" else cpu.cpu_mode()

    def native(self) -> contextlib.AbstractContextManager:
        """Enter around a model's forward inside `megatron()`, where no redirection is needed."""
        return contextlib.nullcontext() if self.device.type == "cuda" else cpu.native()


def world_size_from_environment() -> int:
    """What torchrun or srun promised; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    timeout: timedelta,
    seed: int,
    device: str = "auto",
    virtual_stages: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
) -> Runtime:
    """Join the job and build its groups.

    `device` is "auto" (CUDA where there is one), "cpu" or "cuda". Every collective's deadline is `timeout`.
    Megatron-core's random streams are seeded from `seed`, one per tensor-parallel rank, alike over replicas; so are
    torch's, numpy's and Python's, which nothing here draws from.
    virtual_stages: model chunks per pipeline rank. expert_tensor_parallel_size None: experts are split as other layers.

    Raises UserError when CUDA is asked for and absent.
    """
    # One launch queue keeps compute and tensor-parallel collectives in the order in which Megatron-core overlaps them.
    # CUDA reads it when it starts, which asking for a device may do.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this process sees no CUDA device; use --device cpu or fix CUDA_VISIBLE_DEVICES")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank, world_size = int(os.environ.get("RANK", "0")), world_size_from_environment()
    if use_cuda:
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(local)
    else:
        local = torch.device("cpu")
        cpu.install()
    if "MASTER_ADDR" not in os.environ:
        if world_size > 1:
            raise UserError("WORLD_SIZE is above 1 but MASTER_ADDR is not set; start with torchrun or srun")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(_free_port())
    dist.init_process_group("nccl" if use_cuda else "gloo", rank=rank, world_size=world_size, timeout=timeout)
    with contextlib.nullcontext() if use_cuda else cpu.cpu_mode():
        groups = build_groups(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            timeout,
            virtual_stages=virtual_stages,
            expert_model_parallel_size=expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
        )
        random.seed(seed)
        numpy.random.seed(short_seed(seed))
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=use_cuda)
    return Runtime(rank, world_size, local, groups)


def start_configured(layout: ParallelConfig, seed: int) -> Runtime:
    """`start` with a run's settings. UserError where --model-class names what this Megatron-core does not have."""
    if layout.model_class == "hybrid":
        versions.check_hybrid_model()
    return start(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        timeout=timedelta(minutes=layout.distributed_timeout_minutes),
        seed=seed,
        device=layout.device,
        virtual_stages=layout.num_virtual_stages_per_pipeline_rank,
    )


def stop() -> None:
    """Leave the job. Call on the way out of a healthy run only: after a failure the peers may not answer."""
    destroy_groups()
    dist.destroy_process_group()


def raise_on_all_ranks(runtime: Runtime, error: str | None, kind: type[UserError | RunFailure] = UserError) -> None:
    """Raise the same UserError (or RunFailure, by `kind`) on every rank where any rank has an `error`, else return.

    Every rank calls it (one all-gather over the job), so that no rank is left waiting for one that failed.
    """
    errors: list[tuple[type[UserError | RunFailure], str] | None] = [None] * runtime.world_size
    dist.all_gather_object(errors, None if error is None else (kind, error))
    first = next((entry for entry in errors if entry is not None), None)
    if first is not None:
        kind, message = first
        raise kind(message)


@overload
def on_all_ranks(runtime: Runtime | None, work: Callable[[], T]) -> T: ...
@overload
def on_all_ranks(runtime: Runtime | None, work: Callable[[], T], *, main_only: bool) -> T | None: ...


def on_all_ranks(runtime: Runtime | None, work: Callable[[], T], *, main_only: bool = False) -> T | None:
    """Return work() of every rank (main_only: of rank 0 alone, None elsewhere) and raise one rank's error on all ranks.

    Raises UserError and RunFailure as they are; an OSError becomes a UserError naming its file. Every rank calls it.
    runtime None: there are no other ranks.
    """
    if runtime is None:
        return work()
    result, error, kind = None, None, UserError
    if runtime.is_main or not main_only:
        try:
            result = work()
        except UserError as failure:
            error = str(failure)
        except RunFailure as failure:
            error, kind = str(failure), RunFailure
        except OSError as failure:
            error = f"{failure.filename or 'a file'}: {reason(failure)}"
    raise_on_all_ranks(runtime, error, kind)
    return result


def on_main_rank(runtime: Runtime | None, work: Callable[[], T]) -> T:
    """Return work() of rank 0 on every rank, and raise its error on all ranks, as on_all_ranks does. work() is not None
    and can be pickled.
    """
    results = [on_all_ranks(runtime, work, main_only=True)]
    if runtime is not None:
        dist.broadcast_object_list(results, src=0)
    [result] = results
    assert result is not None, "rank 0 has broadcast it"
    return result


def peak_memory_bytes(runtime: Runtime) -> int:
    """Peak of this process: allocated CUDA memory, or resident memory on CPU."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    try:  # getrusage's figure begins at that of the process which started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return int(kilobytes) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
