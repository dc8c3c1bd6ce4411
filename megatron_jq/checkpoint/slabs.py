"""F4: a checkpoint's tensors slab by slab (model/hf.py), and the shards in which a tensor-parallel size stores them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_jq.architecture import Architecture, padded_vocab_size
from megatron_jq.checkpoint.shards import MAIN_WEIGHT, OPTIMIZER_PREFIX, RANDOM_PREFIX
from megatron_jq.checkpoint.torch_dist import ShardReader
from megatron_jq.errors import UserError
from megatron_jq.model.hf import VOCABULARY, Slab, hugging_face_tensors, megatron_tensors
from megatron_jq.model.initialise import partition_dim


@dataclass(frozen=True)
class SlabShard:
    """Rows and columns of one slab; columns None: it is a vector."""

    slab: Slab
    rows: tuple[int, int]
    columns: tuple[int, int] | None

    @property
    def offset(self) -> tuple[int, ...]:
        """In the global tensor."""
        return (*self.slab.index, self.rows[0], *(() if self.columns is None else (self.columns[0],)))

    @property
    def shape(self) -> tuple[int, ...]:
        """In the global tensor's axes: one layer, one expert."""
        return (*(1 for _ in self.slab.index), *self.slab_shape)

    @property
    def slab_shape(self) -> tuple[int, ...]:
        extents = (self.rows,) if self.columns is None else (self.rows, self.columns)
        return tuple(end - start for start, end in extents)


@dataclass(frozen=True)
class ShardLayout:
    """How slabs are stored: in the shards that a job of this tensor-parallel size reads. Any other can read them."""

    tensor_model_parallel_size: int = 1
    make_vocab_size_divisible_by: int = 128

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Key → global shape of the model's tensors; the vocabulary is padded for this size."""
        assert architecture.vocab_size is not None
        rows = padded_vocab_size(
            architecture.vocab_size, self.make_vocab_size_divisible_by, self.tensor_model_parallel_size
        )
        return megatron_tensors(architecture, rows)

    def shards(self, key: str, shape: tuple[int, ...], axes: int) -> Iterator[SlabShard]:
        """Yield a global tensor's shards; its last `axes` axes are a slab's. UserError where they would be uneven."""
        split, count = partition_dim(key), self.tensor_model_parallel_size
        if key.endswith("linear_fc1.weight"):
            count *= 2  # the gate's rows and the up projection's are shared out separately
        lead, extents = shape[: len(shape) - axes], shape[len(shape) - axes :]
        ranges = [_even_ranges(key, n, count) if dim == split else [(0, n)] for dim, n in enumerate(extents)]
        for index in itertools.product(*map(range, lead)):
            for rows, *columns in itertools.product(*ranges):
                yield SlabShard(Slab(key, index), rows, columns[0] if columns else None)


def _even_ranges(key: str, extent: int, count: int) -> list[tuple[int, int]]:
    if extent % count:
        raise UserError(
            f"--tensor-model-parallel-size does not divide {key}: {extent} rows or columns in {count} parts; "
            "choose a divisor of the architecture's heads, groups and widths"
        )
    step = extent // count
    return [(start, start + step) for start in range(0, extent, step)]


def slab_axes(architecture: Architecture) -> dict[str, int]:
    """Key → axes of its slabs: 2 for matrices, 1 for vectors."""
    return {span.slab.key: len(tensor.shape) for tensor in hugging_face_tensors(architecture) for span in tensor.spans}


def model_key(key: str) -> str | None:
    """The key of the model's tensor that a stored one is, or belongs to (moments, main weights); None: to none."""
    if key.startswith(RANDOM_PREFIX):
        return None
    if key.startswith(OPTIMIZER_PREFIX):
        key = key.removeprefix(OPTIMIZER_PREFIX).partition(".")[2]
    return key


class SlabReader:
    """A checkpoint's slabs. It keeps the last one: the tensors that a slab becomes are asked for one after another."""

    def __init__(self, reader: ShardReader):
        self.reader = reader
        self._last: tuple | None = None
        self._slab = torch.empty(0)

    def read(self, slab: Slab, rows: int | None = None) -> torch.Tensor:
        """A slab in its stored dtype; rows: its length, where it is the vocabulary's. Do not change it."""
        if self._last != (slab, rows):
            self._last, self._slab = None, torch.empty(0)  # before the next one takes memory
            shape = self.reader.tensors[slab.key][0][len(slab.index) :]
            if rows is not None:
                shape = (rows, *shape[1:])
            offset, extents = (*slab.index, *(0 for _ in shape)), (*(1 for _ in slab.index), *shape)
            self._last, self._slab = (slab, rows), self.reader.read(slab.key, offset, extents).view(shape)
        return self._slab


def check_stored(slabs: SlabReader, architecture: Architecture, folder: Path) -> None:
    """Raise UserError where one of the model's tensors is missing, has another shape, or is none of its own."""
    assert architecture.vocab_size is not None
    tensors, expected = slabs.reader.tensors, megatron_tensors(architecture, architecture.vocab_size)
    stored = {key for key in tensors if not key.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))}
    for what, names in (("lacks", expected.keys() - stored), ("has unexpected", stored - expected.keys())):
        if names:
            raise UserError(f"{folder} {what} tensors, {len(names)} in all: {', '.join(sorted(names)[:3])}")
    for key, shape in expected.items():
        actual = tensors[key][0]
        fits = actual[1:] == shape[1:] and actual[0] >= shape[0] if key in VOCABULARY else actual == shape
        if not fits:
            raise UserError(f"{folder}: {key} has shape {actual}, by its architecture {shape}")


def main_weight(key: str) -> str:
    """The key of the float32 copy that a bfloat16 run's optimizer keeps of a weight."""
    return f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}.{key}"
