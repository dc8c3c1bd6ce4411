"""F4: a Hugging Face folder as a checkpoint to begin from: its weights are read into a policy straight from its files.

Every rank reads the rows and columns that it holds, one shard at a time: no second copy is written, and memory holds a
shard beside the policy. convert.py writes the same shards to disk.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_jq.architecture import Architecture
from megatron_jq.architecture_files import has_weights, read_hugging_face_config
from megatron_jq.checkpoint.contents import checksums
from megatron_jq.checkpoint.folder import Manifest
from megatron_jq.checkpoint.huggingface import CONFIG, HuggingFaceReader, Signature, WeightReader, check_tensors
from megatron_jq.checkpoint.loader import Checkpoint
from megatron_jq.checkpoint.slabs import SlabShard, slab_axes
from megatron_jq.checkpoint.torch_dist import Shard
from megatron_jq.errors import UserError
from megatron_jq.model.hf import HuggingFaceTensor, RowSpan, Slab, hugging_face_tensors, megatron_tensors, rows_of_slabs
from megatron_jq.parallel.runtime import Runtime, on_all_ranks

#: Tensors of older files that are computed, not learnt.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class HuggingFaceWeights:
    """Read as ShardReader reads a checkpoint: shards of Megatron-core's tensors. Reads are local.

    UserError, which names the flag or the file, where the folder does not hold exactly the tensors of its config.json.
    """

    def __init__(self, folder: Path, flag: str):
        self.folder = folder
        self.files = HuggingFaceReader(folder, flag)
        self.architecture = read_hugging_face_config(folder / CONFIG)
        vocab_size = self.architecture.vocab_size
        assert vocab_size is not None
        self.vocab_size: int = vocab_size
        tensors = hugging_face_tensors(self.architecture)
        self.signature = own_tensors(self.files.signature, self.architecture)
        check_tensors(self.signature, {tensor.name: tensor.shape for tensor in tensors}, folder)
        self._slabs, self._axes = rows_of_slabs(tensors), slab_axes(self.architecture)
        dtypes = {slab.key: self.signature[spans[0][0].name][1] for slab, spans in self._slabs.items()}
        shapes = megatron_tensors(self.architecture, vocab_size)
        #: key → (global shape, dtype); the vocabulary without padding
        self.tensors = {key: (shape, dtypes[key]) for key, shape in shapes.items()}

    def read_into(self, shards: Iterable[Shard]) -> None:
        """Fill every shard's data in place, converting dtypes; rows of the vocabulary's padding become zero."""
        for shard in shards:
            lead, data = len(shard.offset) - self._axes[shard.key], shard.data()
            extents = [(start, start + length) for start, length in zip(shard.offset, shard.shape, strict=True)]
            rows, *columns = extents[lead:]
            for index in itertools.product(*(range(*extent) for extent in extents[:lead])):
                slab = Slab(shard.key, index)
                slab_shard = SlabShard(slab, rows, columns[0] if columns else None)
                place = tuple(i - start for i, (start, _) in zip(index, extents, strict=False))
                dtype = self.tensors[shard.key][1]
                data[place].copy_(assemble(self.files, self._slabs[slab], slab_shard, dtype))


@dataclass(frozen=True)
class HuggingFaceCheckpoint(Checkpoint):
    """A Hugging Face folder in a checkpoint's place: weights of step 0, and a tokenizer."""

    weights: HuggingFaceWeights

    def reader(self) -> HuggingFaceWeights:
        return self.weights

    @property
    def tokenizer(self) -> Path:
        return self.folder

    @property
    def description(self) -> str:
        return f"{self.folder} (Hugging Face)"


def is_hugging_face_folder(path: Path) -> bool:
    """Whether a folder holds a model with weights of some form, readable or not."""
    return has_weights(str(path)) and (path / CONFIG).is_file()


def open_folder(folder: Path, flag: str, runtime: Runtime) -> HuggingFaceCheckpoint:
    """Open a folder on all ranks; no weights are read yet, but to see that a tied output layer is the embedding.

    UserError on every rank where any cannot read it, or its tensors are not what its config.json describes.
    """
    weights = on_all_ranks(runtime, lambda: HuggingFaceWeights(folder, flag))
    on_all_ranks(runtime, lambda: check_duplicates(weights.files, weights.architecture), main_only=True)
    manifest = Manifest(
        step=0,
        architecture=asdict(weights.architecture),
        vocab_size=weights.vocab_size,
        bf16=weights.signature["model.embed_tokens.weight"][1] == torch.bfloat16,
        source={"kind": "huggingface", "folder": folder.resolve().name},
    )
    return HuggingFaceCheckpoint(folder, manifest, weights)


def digests(weights: HuggingFaceWeights, runtime: Runtime) -> dict[str, dict]:
    """Return checksums of the folder's weight files, shared out over ranks, alike on all of them."""
    names = sorted({path.name for path in weights.files.paths})
    local = on_all_ranks(runtime, lambda: checksums(weights.folder, names[runtime.rank :: runtime.world_size]))
    by_rank: list[dict] = [{}] * runtime.world_size
    dist.all_gather_object(by_rank, local)
    return {name: entry for files in by_rank for name, entry in files.items()}


def own_tensors(signature: Signature, architecture: Architecture) -> Signature:
    """A folder's tensors but those that say nothing of their own: a tied output layer, RoPE's frequencies."""
    tied = architecture.tie_embeddings and "model.embed_tokens.weight" in signature
    return {
        name: entry
        for name, entry in signature.items()
        if not _COMPUTED.fullmatch(name) and not (tied and name == "lm_head.weight")
    }


def check_duplicates(reader: WeightReader, architecture: Architecture) -> None:
    """Raise UserError where a tied model's folder holds an output layer that is not the embedding."""
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    if not architecture.tie_embeddings or not {embedding, output} <= reader.signature.keys():
        return
    rows = reader.signature[embedding][0][0]
    same = reader.signature[output] == reader.signature[embedding]
    for start in range(0, rows if same else 0, 8192):
        block = start, min(start + 8192, rows)
        if not torch.equal(reader.read(output, block), reader.read(embedding, block)):
            same = False
            break
    if not same:
        raise UserError(
            f"{reader.folder}: {CONFIG} ties the embeddings, but {output} is not {embedding}; "
            f"set tie_word_embeddings to false there, or remove {output}"
        )


def assemble(
    reader: WeightReader, spans: list[tuple[HuggingFaceTensor, RowSpan]], shard: SlabShard, dtype: torch.dtype
) -> torch.Tensor:
    """Return a slab's shard, from the row spans that make up the slab; zero where it is padding."""
    out = torch.zeros(shard.slab_shape, dtype=dtype)
    for tensor, span in spans:
        start, end = max(shard.rows[0], span.at), min(shard.rows[1], span.at + span.count)
        if start < end:
            shift = span.start - span.at
            every_column = shard.columns is None or shard.columns == (0, tensor.shape[1])
            out[start - shard.rows[0] : end - shard.rows[0]] = reader.read(
                tensor.name, (start + shift, end + shift), None if every_column else shard.columns
            )
    return out
