"""CUDA by name: tensors that lie on the CPU, but say that they lie on `cuda:0` and refuse to meet those that do not.

torch's FakeTensorMode will not do: in a torch built without CUDA it aborts at the first gradient, and it has no values
for a program to branch on. Here everything is computed, on the CPU, by the code that a GPU would run: `tensor.device`
is `cuda:0`, so branches by device go that way, and each operation checks that its tensors lie on one device, as torch
does.

What it cannot see: kernels themselves, streams, and the few operations that only CUDA refuses.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import megatron.core.tensor_parallel.random as megatron_random
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_DEVICE, _IS_CUDA, _IS_CPU = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
_aten = torch.ops.aten


class DeviceMismatch(RuntimeError):
    """What torch says on a machine with a GPU: expected all tensors to be on the same device."""


#: How often the host has waited for the pretended device, by kind.
WAITS: Counter[str] = Counter()


class _Places:
    """Which storages lie on the pretended device."""

    def __init__(self):
        self._cuda: dict[int, StorageWeakRef] = {}  # as long as it is referred to, no other storage gets its number

    def of(self, tensor: Tensor) -> torch.device:
        return CUDA if tensor.untyped_storage()._cdata in self._cuda else CPU

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        if device is CUDA:
            self._cuda[reference.cdata] = reference
        else:
            self._cuda.pop(reference.cdata, None)
        if len(self._cuda) > 1 << 14:
            self._cuda = {number: held for number, held in self._cuda.items() if not held.expired()}
        return tensor


def _named(device) -> torch.device | None:
    """The device that an argument names; a number is a GPU's."""
    if device is None or isinstance(device, torch.dtype):
        return None
    return CUDA if isinstance(device, int) or str(device).startswith("cuda") else CPU


class _Names(TorchFunctionMode):
    """What a program says and asks of devices: factories, moves, `.device`."""

    def __init__(self, places: _Places):
        super().__init__()
        self._places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, places = dict(kwargs or {}), self._places
        if func == _DEVICE:
            return places.of(args[0])
        if func in (_IS_CUDA, _IS_CPU):
            return (places.of(args[0]) is CUDA) == (func == _IS_CUDA)
        if func is torch.Tensor.cuda:
            return self._moved(args[0], args[0], CUDA)
        if func is torch.Tensor.cpu:
            return self._moved(args[0], args[0], CPU)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return name.replace("torch.", "torch.cuda.") if places.of(args[0]) is CUDA else name
        if func is torch.Tensor.numpy and places.of(args[0]) is CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.tolist and places.of(args[0]) is CUDA:
            WAITS["tolist"] += 1
        device = _named(kwargs.pop("device", None))
        kwargs.pop("pin_memory", None)
        if device is None:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and device is CUDA and not isinstance(args[0], Tensor):
            WAITS["copy from host"] += 1
        result = func(*args, **kwargs, device=CPU)
        if any(result is x for x in args):  # as_tensor of a tensor
            return self._moved(result, result, device)
        return places.put(result, device)

    def _to(self, tensor: Tensor, *args, **kwargs):
        copy, other = kwargs.pop("copy", False), kwargs.pop("other", args[0] if args else None)
        if isinstance(other, Tensor):
            device, dtype, non_blocking, args = self._places.of(other), other.dtype, False, ()
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        done = torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy)
        return done if device is None else self._moved(tensor, done, _named(device), non_blocking)

    def _moved(self, before: Tensor, after: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        places = self._places
        if places.of(before) is device:
            return after
        if device is CPU:
            WAITS["copy to host"] += 1
        elif not non_blocking:
            WAITS["copy from host"] += 1
        same = after.untyped_storage()._cdata == before.untyped_storage()._cdata
        return places.put(after.clone() if same else after, device)


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


#: May take tensors of two devices: the first one's is that of the result.
_MOVES = (_aten.copy_.default, _aten._to_copy.default)
#: Take indices from the host too; the host's tensors take none from the device.
_INDEX = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
#: Take no host's number in place of a device's tensor.
_STRICT = (_aten.cat.default, _aten.stack.default)


class _Operations(TorchDispatchMode):
    """Every operation, those of a backward pass included: one device, and its results lie there."""

    def __init__(self, places: _Places):
        super().__init__()
        self._places, self.objects_travel = places, False
        self.host_groups: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        places = self._places
        tensors = list(_tensors((*args, *kwargs.values())))
        found_places = [places.of(x) for x in tensors]
        if func.namespace == "c10d":
            self._collective(func, args, found_places)
            return func(*args, **kwargs)
        device = CUDA if CUDA in found_places else CPU
        if func in _MOVES:
            device = found_places[0]
        elif func in _INDEX:
            self._index(func, args, tensors, found_places)
        elif device is CUDA and any(
            place is CPU and (x.dim() > 0 or func in _STRICT) for x, place in zip(tensors, found_places, strict=True)
        ):
            raise DeviceMismatch(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        if device is CUDA:
            self._waits(func, args, kwargs)
        result = _emulated(func, args, kwargs) if device is CUDA and func in _KERNELS else func(*args, **kwargs)
        held = {x.untyped_storage()._cdata for x in tensors}
        for x in _tensors((result,)):
            if x.untyped_storage()._cdata not in held:
                places.put(x, device)
        return result

    def _index(self, func, args, tensors, found_places) -> None:
        values = args[2] if len(args) > 2 else args[0]
        on_host = found_places[0] is CPU
        if (on_host and CUDA in found_places) or (not on_host and self._places.of(values) is CPU and values.dim() > 0):
            raise DeviceMismatch(f"{func}: indices or values lie on another device than the indexed tensor")
        if not on_host and CPU in found_places[1 : len(found_places) - (len(args) > 2)]:
            WAITS["index from host"] += 1
        if not on_host and any(x is not None and x.dtype == torch.bool for x in args[1]):
            WAITS["boolean index"] += 1

    def _waits(self, func, args, kwargs) -> None:
        name = func.overloadpacket.__name__
        ragged = name == "repeat_interleave" and isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
        if ragged or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            WAITS[name] += 1

    def _collective(self, func, args, found_places) -> None:
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        of_host = self.objects_travel or group.group_name in self.host_groups
        if not of_host and CPU in found_places and func.overloadpacket.__name__ != "barrier":
            raise DeviceMismatch(f"{func}: No backend type associated with device type cpu")


def _emulated(func, args, kwargs):
    """The flash kernels by their definition, in float32, with their results' shapes and what they refuse."""
    backward = func is _KERNELS[1]
    q, k, v = args[1:4] if backward else args[:3]
    scale, place = kwargs["scale"], 11 if backward else 4
    causal = len(args) > place and args[place]  # the dispatcher leaves out trailing defaults
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[1] % k.shape[1] == 0
    wide = [x.float() for x in (q, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)))]
    score = scale * wide[0] @ wide[1].transpose(-1, -2)
    if causal:
        score = score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if not backward:
        lse = score.logsumexp(dim=-1)
        out = ((score - lse[..., None]).exp() @ wide[2]).to(q.dtype)
        state = torch.zeros(2, dtype=torch.uint64)
        return out, lse, None, None, q.shape[2], k.shape[2], state, torch.zeros((), dtype=torch.uint64), q.new_empty(0)
    grad, out, lse = args[0].float(), args[4].float(), args[5]
    assert args[6] is None and args[7] is None and args[8:10] == (q.shape[2], k.shape[2]) and lse.is_contiguous()
    weight = (score - lse[..., None]).exp()
    slope = weight * (grad @ wide[2].transpose(-1, -2) - (grad * out).sum(dim=-1, keepdim=True)) * scale
    gradients = slope @ wide[1], slope.transpose(-1, -2) @ wide[0], weight.transpose(-1, -2) @ grad
    groups = (k.shape[1], -1)
    return tuple((x if x is gradients[0] else x.unflatten(1, groups).sum(dim=2)).to(q.dtype) for x in gradients)


_KERNELS = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_backward.default,
)


class _Stream:
    """Nothing runs beside anything here."""

    def synchronize(self) -> None:
        pass

    def record_event(self, *_) -> "_Stream":
        return self

    wait_stream = wait_event = record_event


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Enter to have one GPU by name. Collectives take tensors of the device alone, as NCCL does; those of objects bring
    their own. What the host waits for is counted in WAITS.
    """
    places = _Places()
    operations, names = _Operations(places), _Names(places)
    WAITS.clear()
    replaced = {
        name: _outside(getattr(dist, name), operations) for name in ("all_gather_object", "broadcast_object_list")
    }
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "set_device": lambda device: None,
        "synchronize": lambda *_: None,
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream(),
        "stream": contextlib.nullcontext,
        "manual_seed": torch.manual_seed,
        "max_memory_allocated": lambda *_: 1,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    generator = {"_get_cuda_rng_state": answers["get_rng_state"], "_set_cuda_rng_state": answers["set_rng_state"]}
    replaced["init_process_group"] = _over_gloo(dist.init_process_group)
    replaced["new_group"] = _noted(dist.new_group, operations)
    backend_of = dist.get_backend
    replaced["get_backend"] = lambda group=None: "nccl" if group is None else backend_of(group)
    backward = {"_engine_run_backward": _within(torch.autograd._engine_run_backward, names)}
    with contextlib.ExitStack() as stack:
        for module, changes in (
            (torch.cuda, answers),
            (dist, replaced),
            (megatron_random, generator),
            (torch.autograd, backward),
            (torch.Tensor, {"record_stream": lambda *_: None}),
            (torch.cuda.nccl, {"version": lambda: (2, 27, 0)}),  # torch's log asks for it where the backend is nccl
        ):
            stack.enter_context(mock.patch.multiple(module, **changes))
        stack.enter_context(operations)
        stack.enter_context(names)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _over_gloo(init_process_group):
    def called(backend, **kwargs):
        assert backend == "nccl"
        init_process_group("gloo", **kwargs)

    return called


def _outside(collective, operations: _Operations):
    """A collective of objects, whose tensors lie wherever the backend wants them."""

    def called(*args, **kwargs):
        operations.objects_travel = True
        try:
            return collective(*args, **kwargs)
        finally:
            operations.objects_travel = False

    return called


def _noted(new_group, operations: _Operations):
    """Groups that ask for gloo by name take the host's tensors."""

    def called(*args, backend=None, **kwargs):
        group = new_group(*args, backend=backend, **kwargs)
        if backend == "gloo" and isinstance(group, dist.ProcessGroup):  # a number on ranks outside it
            operations.host_groups.add(group.group_name)
        return group

    return called


def _within(run_backward, names: _Names):
    """torch leaves a mode while it handles a call of backward; a Function's backward is to name devices as well."""

    def called(*args, **kwargs):
        with names:
            return run_backward(*args, **kwargs)

    return called
