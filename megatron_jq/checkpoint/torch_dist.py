"""F4: shards of tensors to and from a folder in Megatron-core's torch_dist format.

torch.distributed.checkpoint's files: one per rank and an index in `.metadata`; with Megatron-core's `metadata.json` and
`common.pt`, so that megatron.core.dist_checkpointing reads it. What this adds to that: tensors are resolved one
at a time while they are written; a shard may be any box of its tensor, so that a flat range of the distributed
optimizer needs no gathering; and the index, which is a pickle, is read by an unpickler that knows the index's own
types and nothing else.
"""

import contextlib
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_jq.checkpoint.folder import DamagedCheckpoint
from megatron_jq.files import inside

#: Of Megatron-core's metadata.json.
_FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)


@dataclass(frozen=True)
class Shard:
    """A box of a global tensor.

    data: the shard itself, contiguous and of this shape; called once, to be written or to be filled.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Callable[[], torch.Tensor]

    @property
    def place(self) -> tuple[str, tuple[int, ...]]:
        return self.key, self.offset

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))


def write_shards(shards: Iterable[Shard], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's shards into an empty folder, with all ranks of the group (None: this process alone).

    A shard that several ranks hold is written by one of them, chosen to even out their bytes. Raises on every rank: the
    first rank's OSError where one met it, RuntimeError with its text otherwise; ValueError where the shards do not fill
    their tensors exactly.
    """
    planner = _SavePlanner({shard.place: shard for shard in shards})
    with _one_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        save({}, storage_writer=_Writer(folder), planner=planner, process_group=group, no_dist=group is None)
    if group is None or group.rank() == 0:
        torch.save({}, folder / "common.pt")  # Megatron-core reads it for what is not a shard: here, nothing
        save_config(_FORMAT, str(folder))


class ShardReader:
    """A folder's tensors. Reads are local: no rank waits for another. DamagedCheckpoint where it is not whole."""

    def __init__(self, folder: Path):
        self._reader = _RestrictedReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._entries = _tensor_entries(self._metadata)
        #: key → (global shape, dtype)
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            key: (tuple(entry.size), entry.properties.dtype) for key, entry in self._entries.items()
        }
        self._stored = {key: _StoredShards(entry) for key, entry in self._entries.items()}

    def stored_shards(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return (offset, shape) of each stored shard of a tensor."""
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._entries[key].chunks]

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return a shard of a tensor, on CPU, in `dtype` (None: the stored one); zeros outside of what is stored."""
        target = torch.zeros(shape, dtype=self.tensors[key][1] if dtype is None else dtype)
        self.read_into([Shard(key, self.tensors[key][0], offset, shape, target.dtype, lambda: target)])
        return target

    def read_into(self, shards: Iterable[Shard]) -> None:
        """Fill every shard's data in place, converting dtypes; what lies outside of the stored tensor stays."""
        planner = _LoadPlanner(self._stored, shards)
        try:
            self._reader.read_data(planner.create_local_plan(), planner)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DamagedCheckpoint(f"{self._reader.path}: {error}") from error


def _tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch's zip writer complains of a position where the disk is full: what the system said is in the context
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None


class _SavePlanner(DefaultSavePlanner):
    """torch's planner over shards instead of a state dict; checks that they fill their tensors."""

    def __init__(self, shards: dict[tuple[str, tuple[int, ...]], Shard]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(shard) for shard in self._shards.values()])
        return self.plan

    def _item(self, shard: Shard) -> WriteItem:
        data = TensorWriteData(shard.chunk, TensorProperties(dtype=shard.dtype), torch.Size(shard.global_shape))
        return WriteItem(MetadataIndex(shard.key, torch.Size(shard.offset)), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for key, entry in _tensor_entries(metadata).items():  # torch checks volumes over several ranks only
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"{key}: the shards do not fill the tensor's {tuple(entry.size)}")
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._shards[index.fqn, tuple(index.offset or ())].data().detach()


class _StoredShards:
    """A tensor's stored shards by layer and expert: torch compares a shard with all of a tensor's, and a mixture of
    experts has ten thousand of them.
    """

    def __init__(self, entry: TensorStorageMetadata):
        self._entry, self._axes = entry, 0  # leading axes along which every stored shard has one entry
        while self._axes < len(entry.size) - 1 and all(chunk.sizes[self._axes] == 1 for chunk in entry.chunks):
            self._axes += 1
        self._by_index: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in entry.chunks:
            self._by_index.setdefault(tuple(chunk.offsets[: self._axes]), []).append(chunk)

    def near(self, shard: Shard) -> TensorStorageMetadata:
        """The tensor's entry, without shards of other layers or experts where the shard lies within one."""
        if any(extent != 1 for extent in shard.shape[: self._axes]):
            return self._entry
        return replace(self._entry, chunks=self._by_index.get(shard.offset[: self._axes], []))


class _LoadPlanner(LoadPlanner):
    """Reads that fill shards from whatever shards were stored."""

    def __init__(self, stored: dict[str, _StoredShards], shards: Iterable[Shard]):
        self._stored, self._shards = stored, list(shards)
        self._data: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the shards are known."""

    def create_local_plan(self) -> LoadPlan:
        items = []
        for shard in self._shards:
            if shard.key not in self._stored:
                raise DamagedCheckpoint(f"there is no tensor {shard.key}")
            items += create_read_items_for_chunk_list(shard.key, self._stored[shard.key].near(shard), [shard.chunk])
            self._data[shard.place] = shard.data().detach()
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._data[read_item.dest_index.fqn, tuple(read_item.dest_index.offset or ())]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: it was filled in place."""


class _RestrictedReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _IndexUnpickler(file).load()
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path} is missing") from error
        except (OSError, pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise DamagedCheckpoint(f"{path} cannot be read: it holds {type(metadata).__name__}, not an index")
        for stored in (metadata.storage_data or {}).values():
            inside(Path(self.path), getattr(stored, "relative_path", None), path, DamagedCheckpoint)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Builds the index's own types; any other name in the file is refused, so that reading it runs no foreign code."""

    _NAMES = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        # Megatron-core's own writer leaves its plans in the index
        "torch.distributed.checkpoint.planner": {
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        },
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # its place since Python 3.13
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index holds")


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """torch's collection of every rank's exceptions → the first one, with its rank in the text."""
    try:
        yield
    except CheckpointException as collected:
        rank, (fault, _) = min(collected.failures.items())
        if isinstance(fault, OSError):
            raise OSError(fault.errno, f"rank {rank}: {fault.strerror}") from collected
        raise (ValueError if isinstance(fault, ValueError) else RuntimeError)(f"rank {rank}: {fault}") from collected
