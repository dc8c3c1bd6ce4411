"""F4: instruments: a clock from barrier to barrier, counters of positions, memory and messages, a matrix product."""

import contextlib
import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_jq.model.policy import Policy
from megatron_jq.model.rows import Rows
from megatron_jq.parallel.runtime import Runtime, peak_memory_bytes


@dataclass(frozen=True)
class Findings:
    """What one phase of one step did on this rank, beside taking time."""

    positions: int  # through this rank's layers, padding included
    head_positions: int  # those that also met the vocabulary
    peak_memory_bytes: int  # above the baseline
    messages: dict[str, tuple[int, int]]  # kind → (calls, bytes)


class Memory:
    """Memory of this process: allocated on CUDA, resident otherwise. The baseline is that of the construction.

    Linux and CUDA can forget a peak, so that a phase has its own; elsewhere a peak is that since the process started.
    """

    STATUS = Path("/proc/self/status")

    def __init__(self, runtime: Runtime):
        self._runtime, self._on_cuda = runtime, runtime.device.type == "cuda"
        self.forget_peak()
        self.baseline = torch.cuda.memory_allocated(runtime.device) if self._on_cuda else self._resident("VmRSS")

    def forget_peak(self) -> None:
        """Also gives freed memory back to the system, or a phase would show what the one before it needed."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._runtime.device)
        elif self.STATUS.exists():
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
            if trim is not None:
                trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: the peak becomes the present size

    def peak_above_baseline(self) -> int:
        peak = peak_memory_bytes(self._runtime) if self._on_cuda else self._resident("VmHWM")
        return max(0, peak - self.baseline)

    def _resident(self, key: str) -> int:
        if not self.STATUS.exists():
            return peak_memory_bytes(self._runtime)
        lines = self.STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


class Meter:
    """Enter its instruments around work that all processes do at once.

    The clock runs alone: counting messages and giving memory back would slow down what is timed. policy: the first of
    this rank's model chunks, which every row passes once.
    """

    def __init__(self, policy: Policy, runtime: Runtime):
        self.memory = Memory(runtime)
        self._policy, self._runtime = policy, runtime

    def wait_for_all(self) -> None:
        """Wait until every process and device has done what was asked of it so far."""
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        dist.barrier()

    @contextlib.contextmanager
    def time(self, note: Callable[[float], None]) -> Iterator[None]:
        """Note the seconds until the last process had finished."""
        self.wait_for_all()
        began = time.perf_counter()
        yield
        self.wait_for_all()
        note(time.perf_counter() - began)

    @contextlib.contextmanager
    def examine(self, note: Callable[[Findings], None]) -> Iterator[None]:
        """Note all but the time. Positions are counted where they enter the policy, in every phase alike."""
        positions = head_positions = 0

        def count(policy: Policy, arguments: tuple[Rows]) -> None:
            nonlocal positions, head_positions
            positions += len(arguments[0].token_T)
            head_positions += len(arguments[0].head.position_N)

        hook = self._policy.register_forward_pre_hook(count)
        self.memory.forget_peak()
        with MessageCounter() as counter:
            yield
        hook.remove()
        note(Findings(positions, head_positions, self.memory.peak_above_baseline(), counter.counted()))


class MessageCounter(TorchDispatchMode):
    """Counts calls and bytes of torch.distributed while entered, whatever name or alias a library calls them by.

    Bytes are those of a call's inputs or outputs on this rank, whichever is more; not those on the wire, which depend
    on the algorithm. A call in a group of one process sends nothing and is left out. The counter slows every torch
    operation down.
    """

    def __init__(self):
        super().__init__()
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and _group_size(func, args) > 1:
            kind = func.overloadpacket.__name__.strip("_")
            self._calls[kind] += 1
            if kind != "barrier":  # its tensor carries nothing
                self._bytes[kind] += max(map(_tensor_bytes, args), default=0)
        return func(*args, **(kwargs or {}))

    def counted(self) -> dict[str, tuple[int, int]]:
        """Kind, in c10d's spelling → (calls, bytes)."""
        return {kind: (self._calls[kind], self._bytes[kind]) for kind in sorted(self._calls)}


def _group_size(func: torch._ops.OpOverload, args: tuple) -> int:
    names = [argument.name for argument in func._schema.arguments]
    return dist.ProcessGroup.unbox(args[names.index("process_group")]).size()


def _tensor_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_tensor_bytes, argument)) if isinstance(argument, list | tuple) else 0


def gemm_rate(dtype: torch.dtype, device: torch.device, *, seconds: float = 1.0) -> float:
    """FLOP/s of square matrix products on this process's threads or device, the mean over a window of `seconds`.

    Sized to be bound by arithmetic. A mean and not the best: other processes multiply in the same window.
    """
    on_cuda = device.type == "cuda"
    size = 8192 if on_cuda else 1024
    left, right = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out = left @ right  # warm-up

    def finished() -> float:
        if on_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began, products = finished(), 0
    while (elapsed := finished() - began) < seconds:
        torch.mm(left, right, out=out)
        products += 1
    return products * 2 * size**3 / elapsed
