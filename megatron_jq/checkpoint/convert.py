"""F4: checkpoints from Hugging Face folders and back, tensor by tensor: memory holds one tensor at a time.

Nothing appears under its name before it is complete and checked; a conversion that fails or is killed leaves at most a
folder named .NAME.partial, which the next one removes.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_jq.architecture import Architecture, RopeScaling
from megatron_jq.architecture_files import read_hugging_face_config
from megatron_jq.checkpoint import contents
from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.added_tokens import GrownReader, plan_tokens
from megatron_jq.checkpoint.folder import TOKENIZER, DamagedCheckpoint, Manifest
from megatron_jq.checkpoint.gguf_weights import hugging_face_source
from megatron_jq.checkpoint.hugging_face_weights import assemble, check_duplicates, own_tensors
from megatron_jq.checkpoint.huggingface import (
    CONFIG,
    HuggingFaceReader,
    Signature,
    WeightReader,
    check_tensors,
    new_folder,
    num_bytes,
    refuse_existing,
    write_weights,
)
from megatron_jq.checkpoint.slabs import ShardLayout, SlabReader, SlabShard, check_stored, main_weight, slab_axes
from megatron_jq.checkpoint.small_files import companions, says, write_companions
from megatron_jq.checkpoint.torch_dist import Shard, ShardReader, write_shards
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.model.hf import VOCABULARY, HuggingFaceTensor, RowSpan, Slab, hugging_face_tensors, rows_of_slabs


def hf_to_megatron(
    source: Path,
    save: Path,
    layout: ShardLayout,
    log: Callable[[str], None] = print,
    *,
    new_tokens: Sequence[str] = (),
) -> Path:
    """Write SAVE/iter_0000000 from a Hugging Face folder, in the folder's dtypes; return it. UserError for bad input.

    source: or a GGUF file, or a folder that holds one; in float32. layout: the tensor-parallel size that the shards are
    for; a job of any other reads them too. log: gets lines for the user. new_tokens: added to the tokenizer, with rows
    of the vocabulary.
    """
    with hugging_face_source(source, "--hf", log) as (folder, reader):
        return _to_megatron(reader, folder, source, save, layout, log, new_tokens)


def _to_megatron(
    reader: WeightReader,
    folder: Path,
    source: Path,
    save: Path,
    layout: ShardLayout,
    log: Callable[[str], None],
    new_tokens: Sequence[str],
) -> Path:
    """folder: of config.json and the tokenizer. source: what messages and the manifest name."""
    architecture = read_hugging_face_config(folder / CONFIG)
    signature = own_tensors(reader.signature, architecture)
    check_tensors(signature, {tensor.name: tensor.shape for tensor in hugging_face_tensors(architecture)}, source)
    check_duplicates(reader, architecture)
    added = None
    if new_tokens:
        refuse_existing(save, "--save")  # before the vocabulary is read
        added = plan_tokens(new_tokens, folder, source, architecture)
        reader, architecture = GrownReader(reader, added), replace(architecture, vocab_size=added.vocab_size)
    vocab_size, tensors = architecture.vocab_size, hugging_face_tensors(architecture)
    assert vocab_size is not None
    spans, axes = rows_of_slabs(tensors), slab_axes(architecture)
    shapes, dtypes = layout.shapes(architecture), _dtype_of_keys(spans, signature, source)
    slab_shards = [shard for key, shape in shapes.items() for shard in layout.shards(key, shape, axes[key])]
    total = sum(num_bytes((shard.slab_shape, dtypes[shard.slab.key])) for shard in slab_shards)
    with new_checkpoint(save, 0) as partial, progress("to Megatron", total) as bar:

        def stored(shard: SlabShard) -> Shard:
            key, dtype = shard.slab.key, dtypes[shard.slab.key]

            def data() -> torch.Tensor:
                bar.update(num_bytes((shard.slab_shape, dtype)))
                return assemble(reader, spans[shard.slab], shard, dtype).view(shard.shape)

            return Shard(key, shapes[key], shard.offset, shard.shape, dtype, data)

        contents.carry_tokenizer(folder, partial)
        if added is not None:
            added.write(partial / TOKENIZER, log)
        write_shards([stored(shard) for shard in slab_shards], partial)
        manifest = Manifest(
            step=0,
            architecture=asdict(architecture),
            vocab_size=vocab_size,
            bf16=signature["model.embed_tokens.weight"][1] == torch.bfloat16,
            versions=folders.package_versions("safetensors"),
            source={
                "kind": "huggingface",
                "folder": source.resolve().name,
                **({} if added is None else {"added_tokens": added.ids}),
            },
        )
        saved = folders.commit(partial, manifest)
    if added is not None:
        log(f"{added.description()}; train with --model {saved / TOKENIZER} --load {save}")
    return saved


def _dtype_of_keys(
    spans_of_slabs: dict[Slab, list[tuple[HuggingFaceTensor, RowSpan]]], signature: Signature, source: Path
) -> dict[str, torch.dtype]:
    dtypes: dict[str, torch.dtype] = {}
    for slab, spans in spans_of_slabs.items():
        for tensor, _ in spans:
            dtype = signature[tensor.name][1]
            if dtypes.setdefault(slab.key, dtype) != dtype:
                raise UserError(
                    f"{source}: {tensor.name} has {dtype}, its counterparts in other tensors or layers "
                    f"{dtypes[slab.key]}; save the folder in one dtype"
                )
    return dtypes


def megatron_to_hf(
    load: Path,
    target: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    with_tokenizer: bool = True,
    log: Callable[[str], None] = print,
) -> Path:
    """Write a Hugging Face folder from the newest whole checkpoint in (or at) `load`; return the checkpoint.

    with_tokenizer: whether the tokenizer goes along, which is refused where transformers would read another. log:
    gets lines for the user.

    dtype: None leaves each tensor as it is stored. Float32 takes a bfloat16 run's float32 main weights where it left
    them. What was written is read again and held against the family's names, shapes and dtypes before it appears.
    """
    refuse_existing(target, "--hf")  # before the checksums, which take a while
    with whole_checkpoint(load) as (folder, manifest):
        slabs, architecture = SlabReader(ShardReader(folder)), architecture_of(manifest)
        check_stored(slabs, architecture, folder)
        tensors = {tensor.name: tensor for tensor in hugging_face_tensors(architecture)}
        keys = {key: _source_of(slabs, key, dtype) for key in slab_axes(architecture)}
        signature: Signature = {
            name: (tensor.shape, dtype or slabs.reader.tensors[keys[tensor.spans[0].slab.key]][1])
            for name, tensor in tensors.items()
        }
        embedding_dtype = signature["model.embed_tokens.weight"][1]
        beside = companions(folder, manifest, architecture, embedding_dtype, with_tokenizer=with_tokenizer)
        with (
            new_folder(target, "--hf") as partial,
            progress("to Hugging Face", sum(map(num_bytes, signature.values()))) as bar,
        ):

            def read(name: str) -> torch.Tensor:
                bar.update(num_bytes(signature[name]))
                return _gather(slabs, tensors[name], keys).to(signature[name][1])

            write_weights(partial, signature, read, max_shard_bytes)
            write_companions(beside, partial, log)
            _check_written(partial, signature, architecture)
    return folder


def _source_of(slabs: SlabReader, key: str, dtype: torch.dtype | None) -> str:
    """The stored tensor that a key of the table is read from."""
    main = main_weight(key)
    return main if dtype == torch.float32 and main in slabs.reader.tensors else key


def _gather(slabs: SlabReader, tensor: HuggingFaceTensor, keys: dict[str, str]) -> torch.Tensor:
    slices = []
    for span in tensor.spans:
        rows = tensor.shape[0] if span.slab.key in VOCABULARY else None
        slab = slabs.read(Slab(keys[span.slab.key], span.slab.index), rows)
        slices.append(slab[span.at : span.at + span.count])
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def _check_written(partial: Path, expected: Signature, architecture: Architecture) -> None:
    written = HuggingFaceReader(partial)
    check_tensors(written.signature, {name: shape for name, (shape, _) in expected.items()}, partial)
    for name, (_, dtype) in expected.items():
        assert written.signature[name][1] == dtype, f"{name} was written as {written.signature[name][1]}"
    assert says(partial / CONFIG, architecture), "config.json does not describe the weights"


def architecture_of(manifest: Manifest) -> Architecture:
    """The checkpoint's architecture with its vocabulary's true size."""
    table = {**manifest.architecture, "vocab_size": manifest.vocab_size}
    if table.get("rope_scaling") is not None:
        table["rope_scaling"] = RopeScaling(**table["rope_scaling"])
    return Architecture(**table)


@contextmanager
def whole_checkpoint(load: Path) -> Iterator[tuple[Path, Manifest]]:
    """The newest checkpoint in (or at) `load`, every checksum verified. UserError where it is not whole: a command that
    is run once must not take another step than the one that it was pointed at.
    """
    try:
        damaged: list[str] = []
        folder = folders.find(load, log=damaged.append)
        if damaged:
            texts = "; ".join(text.removeprefix("warning: ").replace(" and skipped", "") for text in damaged)
            raise UserError(f"--load {load}: {texts}; to take the newest intact one, give --load {folder}")
        yield folder, folders.read_manifest(folder)
    except DamagedCheckpoint as error:
        raise UserError(f"--load {load}: {error}") from error


@contextmanager
def new_checkpoint(save: Path, step: int) -> Iterator[Path]:
    """A folder to write a checkpoint into, removed when that fails; the block commits it. UserError where `save` holds
    something already, or cannot be written.
    """
    refuse_existing(save, "--save", but=f".{folders.folder_name(step)}.partial")
    is_new = not save.exists()
    try:
        partial = folders.begin(save, step)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if is_new and not any(save.iterdir()):
                save.rmdir()
    except OSError as error:
        raise UserError(f"--save {save} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # of torch's writer
        raise RunFailure(f"--save {save} was not written: {error}") from error


def progress(what: str, total: int) -> tqdm:
    """A bar over bytes, on a terminal."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False)
