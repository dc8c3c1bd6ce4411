"""F2: lets Megatron-core run where there is no CUDA, without touching its files.

Megatron-core asks for `torch.cuda` in six ways that have an exact meaning on a CPU: the current device, the current
stream (DDP's gradient reduction, after 0.17.0), the random state, a synchronise, the copy of expert counts to the host,
and `device="cuda"` in a factory call. `install` answers the first five; `cpu_mode` redirects the last while it is
entered. The mode costs a Python call for every torch call, so `native` leaves it for the model's own forward, which
needs none of it. For experts under tensor parallelism it gathers shards of unequal length, which gloo cannot: `install`
does so by way of equal ones.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


class _CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = dict(kwargs, device=_CPU)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers compare type strings ("torch.cuda.FloatTensor") to tell fp32 from 16-bit parameters.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _CpuRngTracker:
    """Megatron-core's CudaRNGStatesTracker over the CPU generator: named streams, one for tensor-parallel regions."""

    def __init__(self):
        self.reset()
        self.use_cudagraphable_rng = False

    def is_initialized(self) -> bool:
        return self._initialized

    def reset(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()
        self._initialized = False

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_, self._initialized = dict(states), True

    def add(self, name: str, seed: int) -> None:
        assert seed not in self.seeds_ and name not in self.states_, f"random stream {name} exists already"
        self._initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def _counts_on_host(dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
    """MoEAlltoAllTokenDispatcher's copy of its counts to the host, where they lie already: no stream, nothing to await.

    The split sizes become numpy arrays there, as torch's all-to-all wants them.
    """
    if point == dispatcher.cuda_dtoh_point and not dispatcher.drop_and_pad:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(dispatcher, name)
            setattr(dispatcher, name, None if splits is None else splits.numpy())
    return tokens_per_expert


def _gather_of_unequal_shards(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def gathered(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        shards = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(shards, padded, group=group)
        return torch.cat([shard[:length] for shard, length in zip(shards, output_split_sizes, strict=True)])

    return gathered


def _reduce_scatter_of_unequal_shards(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def scattered(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone()
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return scattered


def install() -> None:
    """Answer Megatron-core's `torch.cuda` questions for a CPU. Once per process; harmless when repeated."""
    global _installed
    if _installed:
        return
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    torch.cuda.current_device = lambda: _CPU
    torch.cuda.current_stream = lambda *args, **kwargs: torch.cpu.current_stream()
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.manual_seed = torch.manual_seed
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random._CUDA_RNG_STATE_TRACKER = _CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.cpu.Stream()  # in place of a torch.cuda.Stream; not used
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_on_host
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    mappings._gather_along_first_dim = _gather_of_unequal_shards(gather)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_of_unequal_shards(scatter)
    _installed = True


def cpu_mode() -> contextlib.AbstractContextManager:
    """Redirect `device="cuda"` to the CPU while entered. Thread-local."""
    return _CudaToCpu()


def native() -> contextlib.AbstractContextManager:
    """Leave `cpu_mode` for the enclosed calls, which name no device."""
    return torch._C.DisableTorchFunction()
