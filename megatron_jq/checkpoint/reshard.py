"""F4: a checkpoint stored again in another layout's shards, and what a checkpoint holds, in words."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.convert import architecture_of, new_checkpoint, progress, whole_checkpoint
from megatron_jq.checkpoint.folder import MANIFEST, Manifest
from megatron_jq.checkpoint.huggingface import num_bytes
from megatron_jq.checkpoint.shards import OPTIMIZER_PREFIX, RANDOM_PREFIX
from megatron_jq.checkpoint.slabs import ShardLayout, SlabReader, SlabShard, check_stored, model_key, slab_axes
from megatron_jq.checkpoint.torch_dist import Shard, ShardReader, write_shards
from megatron_jq.files import inside
from megatron_jq.model.hf import VOCABULARY

#: What torch_dist.py writes beside *.distcp.
_INDEX_FILES = (".metadata", "metadata.json", "common.pt", MANIFEST)


def reshard(load: Path, save: Path, layout: ShardLayout) -> Path:
    """Write the newest whole checkpoint in (or at) `load` again into SAVE/iter_NNNNNNN, in another tensor-parallel
    size's shards: weights, main weights, moments. Random states and all other files stay as they are.

    Memory holds one slab and one shard of it at a time. UserError for bad input.
    """
    with whole_checkpoint(load) as (folder, manifest):
        reader, architecture = ShardReader(folder), architecture_of(manifest)
        slabs = SlabReader(reader)
        check_stored(slabs, architecture, folder)
        axes, shapes = slab_axes(architecture), layout.shapes(architecture)
        shards = [
            shard
            for key, (shape, dtype) in reader.tensors.items()
            for shard in _shards(slabs, layout, key, shape, dtype, axes, shapes)
        ]
        total = sum(num_bytes((shard.shape, shard.dtype)) for shard in shards)
        with new_checkpoint(save, manifest.step) as partial, progress("reshard", total) as bar:
            write_shards([_counted(shard, bar) for shard in shards], partial)
            for name in manifest.files:
                if name not in _INDEX_FILES and not name.endswith(".distcp"):
                    target = inside(partial, name, folder / MANIFEST)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(inside(folder, name, folder / MANIFEST), target)
            size = layout.tensor_model_parallel_size
            origin = {**(manifest.source or {}), "cut_for_tensor_model_parallel_size": size}
            return folders.commit(partial, replace(manifest, files={}, source=origin))


def _shards(
    slabs: SlabReader,
    layout: ShardLayout,
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axes: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
) -> list[Shard]:
    """One stored tensor in the layout's shards. axes, shapes: of the model's tensors, by their keys in the table."""
    owner = model_key(key)
    if owner is None or owner not in axes:  # no model's tensor: random states
        stored = slabs.reader.stored_shards(key)
        return [
            Shard(key, shape, offset, size, dtype, lambda at=offset, size=size: slabs.reader.read(key, at, size))
            for offset, size in stored
        ]
    vocabulary = owner in VOCABULARY
    target = shapes[owner] if vocabulary else shape  # its padding depends on the layout

    def resharded(shard: SlabShard) -> Shard:
        def data() -> torch.Tensor:
            rows = slabs.read(shard.slab, target[0] if vocabulary else None)[slice(*shard.rows)]
            block = rows if shard.columns is None else rows[:, slice(*shard.columns)]
            return block.clone(memory_format=torch.contiguous_format).view(shard.shape)

        return Shard(key, target, shard.offset, shard.shape, dtype, data)

    return [resharded(shard) for shard in layout.shards(key, target, axes[owner])]


def _counted(shard: Shard, bar: tqdm) -> Shard:
    def data() -> torch.Tensor:
        bar.update(num_bytes((shard.shape, shard.dtype)))
        return shard.data()

    return replace(shard, data=data)


def inspect(load: Path) -> str:
    """Describe the newest whole checkpoint in (or at) `load` in lines of text. UserError where there is none."""
    with whole_checkpoint(load) as (folder, manifest):
        return "\n".join([*_about(folder, manifest), "", *_table(ShardReader(folder)), *_settings(manifest)])


def _about(folder: Path, manifest: Manifest) -> list[str]:
    total = sum(file["bytes"] for file in manifest.files.values())
    lines = [
        f"{folder}: step {manifest.step}, {len(manifest.files)} files, {_size(total)}, checksums verified",
        f"vocabulary of {manifest.vocab_size} tokens, without padding",
    ]
    facts = {
        "layout of the run": manifest.layout,
        "optimizer": manifest.optimizer,
        "metrics": manifest.metrics,
        "made from": manifest.source,
        "written with": manifest.versions,
    }
    for name, values in facts.items():
        if values:
            lines.append(f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}")
    architecture = {key: value for key, value in manifest.architecture.items() if value is not None}
    return [*lines, "architecture:", *(f"  {key:24} {value}" for key, value in architecture.items())]


def _table(reader: ShardReader) -> list[str]:
    rows = [("tensor", "shape", "type", "size", "boxes")]
    totals = {"weights": 0, "optimizer": 0, "random states": 0}
    for key, entry in sorted(reader.tensors.items()):
        kind = "optimizer" if key.startswith(OPTIMIZER_PREFIX) else "weights"
        totals["random states" if key.startswith(RANDOM_PREFIX) else kind] += num_bytes(entry)
        shape, dtype = " x ".join(map(str, entry[0])), str(entry[1]).removeprefix("torch.")
        rows.append((key, shape, dtype, _size(num_bytes(entry)), str(len(reader.stored_shards(key)))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{key:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}  {boxes:>{widths[4]}}"
        for key, shape, dtype, size, boxes in rows
    ]
    parameters = sum(
        math.prod(shape)
        for key, (shape, _) in reader.tensors.items()
        if not key.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))
    )
    summary = ", ".join(f"{name} {_size(size)}" for name, size in totals.items() if size)
    return [*lines, f"{parameters:,} parameters with padding; {summary}"]


def _settings(manifest: Manifest) -> list[str]:
    return (
        ["", "settings of the run:", *(f"  {line}" for line in manifest.config.splitlines())] if manifest.config else []
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"
