"""F4: a rank's part of model, optimizer and random states as shards of layout-independent tensors.

The model's are Megatron-core's sharded_state_dict, so layers carry global indices and gate and up halves are tensors'
halves. Moments and float32 main weights are sharded and named like the parameter they belong to:
`optimizer.state.exp_avg.decoder.layers.…`. The distributed optimizer owns flat ranges of parameters; a range of a
matrix is at most three shards, which are written and filled in place, without gathering. So plain and distributed
optimizer, and all layouts, share one format.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_jq.checkpoint.torch_dist import Shard
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime

OPTIMIZER_PREFIX, RANDOM_PREFIX = "optimizer.state.", "random."
MAIN_WEIGHT = "fp32_param"  # Megatron-core's name for float32 copies of bfloat16 weights


@dataclass(frozen=True)
class ParameterShard:
    """Contiguous elements of a parameter that are a shard of one global tensor (all, or the gate or the up half)."""

    sharded: ShardedTensor
    start: int  # of its elements in the flattened parameter

    @property
    def is_written(self) -> bool:
        """False on ranks that hold a copy: of a tensor-parallel peer's, or of the first stage's tied embedding.

        Copies of other data-parallel replicas count: writing is shared out among them.
        """
        return not any(self.sharded.replica_id[:-1])

    @property
    def rows_may_differ(self) -> bool:
        """The vocabulary's padding depends on the layout."""
        return self.sharded.allow_shape_mismatch


def parameter_shards(policies: list[Policy], runtime: Runtime) -> dict[torch.nn.Parameter, list[ParameterShard]]:
    """Return every parameter of this rank as shards of global tensors."""
    shards: dict[torch.nn.Parameter, list[ParameterShard]] = {}
    metadata = {"dp_cp_group": runtime.groups.collection.dp_cp}
    for policy in policies:
        with runtime.megatron():
            state = policy.sharded_state_dict(metadata=metadata)
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensorFactory | ShardedTensor):
                tensors = [entry] if isinstance(entry, ShardedTensor) else list(nested_values(entry.build()))
                base = entry.data.storage_offset()
                shards[entry.data] = [ParameterShard(t, t.data.storage_offset() - base) for t in tensors]
                assert sum(t.data.numel() for t in tensors) == entry.data.numel()
                assert all(t.data.is_contiguous() for t in tensors), entry.key
    missing = [name for p in policies for name, parameter in p.named_parameters() if parameter not in shards]
    assert not missing, f"no shard holds {missing}"
    return shards


def model_shards(parameters: dict[torch.nn.Parameter, list[ParameterShard]], *, write: bool) -> list[Shard]:
    """Return this rank's weights. write: without copies that another rank writes."""
    return [
        shard
        for parameter_shards in parameters.values()
        for part in parameter_shards
        if part.is_written or not write
        for shard in _shards(part, part.sharded.key, part.sharded.data.detach().view(-1), part.start)
    ]


@dataclass(frozen=True)
class OptimizerRange:
    """What this rank's optimizer keeps of one parameter: elements [start, start + main.numel()) of it, flattened."""

    parameter: torch.nn.Parameter
    main: torch.Tensor  # the tensor that the torch optimizer updates; the parameter itself, or its float32 copy
    start: int
    inner: torch.optim.Optimizer
    group: dict


def optimizer_ranges(optimizer: MegatronOptimizer) -> Iterator[OptimizerRange]:
    """Yield those of all of Megatron-core's optimizers of this rank."""
    for single in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if getattr(single, "is_stub_optimizer", False) or single.optimizer is None:
            continue  # a rank without parameters of its kind
        inner = single.optimizer
        if isinstance(single, DistributedOptimizer):
            for parameter, (group, order) in single.model_param_group_index_map.items():
                main = inner.param_groups[group]["params"][order]
                start = single._get_model_param_range_map(parameter)["param"].start
                yield OptimizerRange(parameter, main, start, inner, inner.param_groups[group])
            continue
        parameters = {}
        if isinstance(single, Float16OptimizerWithFloat16Params):
            for models, mains in zip(single.float16_groups, single.fp32_from_float16_groups, strict=True):
                parameters |= dict(zip(mains, models, strict=True))
        for group in inner.param_groups:
            for main in group["params"]:
                yield OptimizerRange(parameters.get(main, main), main, 0, inner, group)


def optimizer_step(optimizer: MegatronOptimizer) -> int | None:
    """Updates done, for Adam's bias correction; None for an optimizer that does not count."""
    for interval in optimizer_ranges(optimizer):
        step = interval.group.get("step", interval.inner.state[interval.main].get("step"))
        return None if step is None else int(step)
    return None


def state_names(optimizer: MegatronOptimizer) -> list[str]:
    """Return names of the tensors that the optimizer keeps for each element: exp_avg, exp_avg_sq, momentum_buffer."""
    for interval in optimizer_ranges(optimizer):
        return sorted(
            name for name, value in interval.inner.state[interval.main].items() if _per_element(value, interval.main)
        )
    return []


def allocate_state(optimizer: MegatronOptimizer, names: list[str], step: int | None) -> None:
    """Make zeros to be filled where the optimizer has not made its first step, and its step count."""
    for interval in optimizer_ranges(optimizer):
        state = interval.inner.state[interval.main]
        for name in names:
            if not _per_element(state.get(name), interval.main):
                state[name] = torch.zeros_like(interval.main)
        fused = "step" in interval.group or type(interval.inner).__name__.startswith("Fused")
        if step is not None and fused:
            interval.group["step"] = step
        elif step is not None:
            state["step"] = torch.tensor(float(step))  # one per parameter: torch's Adam counts them up one by one


def optimizer_shards(
    optimizer: MegatronOptimizer,
    parameters: dict[torch.nn.Parameter, list[ParameterShard]],
    names: list[str],
    *,
    write: bool,
) -> list[Shard]:
    """Return moments, and main weights where these are not the parameters themselves."""
    shards = []
    for interval in optimizer_ranges(optimizer):
        tensors = {name: interval.inner.state[interval.main][name] for name in names}
        if interval.main.dtype != interval.parameter.dtype:
            tensors[MAIN_WEIGHT] = interval.main
        for part in parameters[interval.parameter]:
            if part.is_written or not write:
                for name, tensor in tensors.items():
                    key = f"{OPTIMIZER_PREFIX}{name}.{part.sharded.key}"
                    shards += _shards(part, key, tensor.detach().view(-1), interval.start)
    return shards


def _per_element(value: object, main: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == main.shape and value.dim() > 0


def _shards(part: ParameterShard, key: str, flat: torch.Tensor, flat_start: int) -> Iterator[Shard]:
    """What a parameter's shard and `flat`, elements of that parameter from flat_start on, have in common."""
    sharded = part.sharded
    start = max(part.start, flat_start)
    stop = min(part.start + sharded.data.numel(), flat_start + flat.numel())
    if start >= stop:
        return
    prepended = (1,) * sharded.prepend_axis_num
    for offset, shape, first in range_shards(tuple(sharded.local_shape), start - part.start, stop - part.start):
        begin = part.start + first - flat_start
        data = flat[begin : begin + math.prod(shape)].view(prepended + shape)
        inside = (0,) * sharded.prepend_axis_num + offset
        place = tuple(a + b for a, b in zip(sharded.global_offset, inside, strict=True))
        yield Shard(key, tuple(sharded.global_shape), place, tuple(data.shape), flat.dtype, lambda data=data: data)


Extent = tuple[int, ...]


def range_shards(shape: Extent, start: int, stop: int) -> Iterator[tuple[Extent, Extent, int]]:
    """Yield (offset, shape, first element) of shards that make up elements [start, stop) in row-major order.

    A vector's range is one shard; a matrix's at most three: the rest of a row, whole rows, the beginning of a row.
    """
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), start)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows [first, last)
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    if start < first * inner:
        yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * inner
    if last * inner < stop:
        yield from _in_row(shape, last, last * inner, stop)


def _in_row(shape: Extent, row: int, start: int, stop: int) -> Iterator[tuple[Extent, Extent, int]]:
    inner = math.prod(shape[1:])
    for offset, extents, first in range_shards(shape[1:], start - row * inner, stop - row * inner):
        yield (row, *offset), (1, *extents), row * inner + first


def random_shards(runtime: Runtime) -> tuple[list[Shard], dict[str, torch.Tensor]]:
    """This rank's random states as rows of tensors over ranks; and by name, to be filled when the shards are read."""
    states = {name: state.to("cpu", copy=True) for name, state in _random_states(runtime).items()}
    shards = [
        Shard(
            f"{RANDOM_PREFIX}{name}", (runtime.world_size, len(state)), (runtime.rank, 0), (1, len(state)), state.dtype,
            lambda state=state: state[None],
        )
        for name, state in states.items()
    ]  # fmt: skip
    return shards, states


def _random_states(runtime: Runtime) -> dict[str, torch.Tensor]:
    numpys = numpy.random.get_state(legacy=True)
    assert isinstance(numpys, tuple)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*numpys[1].tolist(), numpys[2]], dtype=torch.int64),
        **{f"megatron.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()},
    }
    if runtime.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return states


def restore_random_states(states: dict[str, torch.Tensor], runtime: Runtime) -> None:
    """Restore the states of random_shards, once they are read."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *words, position = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(words, dtype=numpy.uint32), position, 0, 0.0))
    tracked = get_cuda_rng_tracker().get_states()
    get_cuda_rng_tracker().set_states({name: states[f"megatron.{name}"] for name in tracked})
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], runtime.device)
