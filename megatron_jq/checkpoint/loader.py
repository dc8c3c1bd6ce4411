"""F4: find a run's newest whole checkpoint and load it on all ranks, whatever layout wrote it.

Every rank reads what it needs by itself; a rank's error is raised on all of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.folder import DamagedCheckpoint, Manifest
from megatron_jq.checkpoint.huggingface import CONFIG
from megatron_jq.checkpoint.shards import (
    MAIN_WEIGHT,
    OPTIMIZER_PREFIX,
    RANDOM_PREFIX,
    ParameterShard,
    allocate_state,
    model_shards,
    optimizer_shards,
    parameter_shards,
    random_shards,
    restore_random_states,
)
from megatron_jq.checkpoint.torch_dist import Shard, ShardReader
from megatron_jq.errors import UserError
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime, on_all_ranks


class TensorReader(Protocol):
    """What weights are read from: a checkpoint's files, or a Hugging Face folder's."""

    @property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Key → (global shape, dtype)."""
        ...

    def read_into(self, shards: Iterable[Shard]) -> None:
        """Fill every shard's data in place, converting dtypes."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, verified."""

    folder: Path
    manifest: Manifest

    def reader(self) -> TensorReader:
        """Return a reader of its tensors."""
        return ShardReader(self.folder)

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer's files."""
        return self.folder / folders.TOKENIZER

    @property
    def description(self) -> str:
        """For people."""
        return f"{self.folder} (step {self.manifest.step})"


def find_checkpoint(
    load: Path, flag: str, runtime: Runtime, log: Callable[[str], None], *, missing_ok: bool = False
) -> Checkpoint | None:
    """Return the newest whole checkpoint in (or at) `load`, alike on all ranks; None where the folder holds none.

    Every file's checksum is verified, files shared out over ranks. Damaged checkpoints are logged (on rank 0) and
    skipped. UserError on all ranks where `load` is no folder (unless missing_ok), or holds damaged checkpoints only.
    """

    def candidates() -> list[Path]:
        return folders.candidates(load, flag) if load.is_dir() or not missing_ok else []

    listed = [on_all_ranks(runtime, candidates, main_only=True) or []]
    dist.broadcast_object_list(listed, src=0)
    damage: list[str] = []
    for folder in listed[0]:
        manifest, damage_text = None, None
        try:
            manifest = folders.read_manifest(folder)
            folders.verify(folder, manifest, sorted(manifest.files)[runtime.rank :: runtime.world_size])
        except DamagedCheckpoint as error:
            damage_text = str(error)
        by_rank: list[str | None] = [None] * runtime.world_size
        dist.all_gather_object(by_rank, damage_text)
        first = next((text for text in by_rank if text is not None), None)
        if first is None and manifest is not None:
            return Checkpoint(folder, manifest)
        damage.append(str(first))
        if runtime.is_main:
            log(f"warning: checkpoint {folder.name} is damaged and passed over: {first}")
    if damage:
        raise folders.none_found(load, damage, flag)
    return None


def check_architecture(checkpoint: Checkpoint, architecture: Architecture, vocab_size: int) -> None:
    """Raise UserError that names every field in which the run's architecture differs from the checkpoint's."""
    saved, differing = checkpoint.manifest.architecture, []
    for name in (f.name for f in fields(Architecture)):
        if name in ("init_method_std", "moe_aux_loss_coeff", "vocab_size", "max_position_embeddings"):
            continue  # no part of the function that the weights are
        expected, stored = getattr(architecture, name), saved.get(name)
        if name == "rope_scaling" and expected is not None:
            expected = vars(expected)
        if expected != stored:
            differing.append(f"{name} is {stored} there and {expected} here")
    if checkpoint.manifest.vocab_size != vocab_size:
        differing.append(f"vocab_size is {checkpoint.manifest.vocab_size} there and {vocab_size} here")
    if differing:
        has_config = checkpoint.manifest.config is None and (checkpoint.tokenizer / CONFIG).is_file()
        path = f" {checkpoint.tokenizer}" if has_config else ""  # a conversion's config.json is its own
        remedy = f"name it with --model{path}, and give no other sizes"
        raise UserError(f"{checkpoint.folder} holds another architecture: {'; '.join(differing)}; {remedy}")


def load_weights(checkpoint: Checkpoint, policies: list[Policy], runtime: Runtime) -> None:
    """Fill the policies' parameters in place, whatever layout wrote them. UserError on every rank where it fails.

    Rows of the vocabulary's padding that the checkpoint lacks become zero.
    """
    parameters = parameter_shards(policies, runtime)
    flexible = _flexible_keys(parameters)
    shards = model_shards(parameters, write=False)
    by_rank: list[set[str]] = [set()] * runtime.world_size
    dist.all_gather_object(by_rank, {shard.key for shard in shards})

    def read() -> None:
        reader = checkpoint.reader()
        stored = {key for key in reader.tensors if not key.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))}
        extra = sorted(stored - set().union(*by_rank))
        if extra:
            raise UserError(f"{checkpoint.folder} holds tensors that the model lacks: {', '.join(extra[:5])}")
        _check_tensors(checkpoint, reader, shards, flexible)
        for shard in shards:
            if shard.key in flexible:
                shard.data().zero_()
        reader.read_into([_exact(shard, reader) for shard in shards])

    on_all_ranks(runtime, read)


def _flexible_keys(parameters: dict[torch.nn.Parameter, list[ParameterShard]]) -> set[str]:
    """Keys of tensors whose first axis is the vocabulary: its padding depends on the layout."""
    return {shard.sharded.key for shards in parameters.values() for shard in shards if shard.rows_may_differ}


def _exact(shard: Shard, reader: TensorReader) -> Shard:
    """A float32 parameter comes from the float32 main weight where a bfloat16 run left one."""
    main = f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}.{shard.key}"
    return replace(shard, key=main) if shard.dtype == torch.float32 and main in reader.tensors else shard


def load_optimizer(
    checkpoint: Checkpoint, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime
) -> None:
    """Fill moments, float32 main weights and the count of updates in place. UserError on every rank where it fails."""
    on_all_ranks(runtime, lambda: _read_optimizer(checkpoint, policies, optimizer, runtime))


def load_random_states(checkpoint: Checkpoint, runtime: Runtime, layout: dict[str, int]) -> None:
    """Restore this rank's random states where the checkpoint's layout is this run's; leave them otherwise."""
    if checkpoint.manifest.layout != layout:
        return
    shards, states = random_shards(runtime)
    on_all_ranks(runtime, lambda: ShardReader(checkpoint.folder).read_into(shards))
    restore_random_states(states, runtime)


def _read_optimizer(
    checkpoint: Checkpoint, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime
) -> None:
    saved = checkpoint.manifest.optimizer
    if saved is None:
        raise UserError(f"{checkpoint.folder} holds weights alone; --finetune starts a new run from them")
    allocate_state(optimizer, saved["state"], saved["step"])
    reader, parameters = ShardReader(checkpoint.folder), parameter_shards(policies, runtime)
    shards = optimizer_shards(optimizer, parameters, saved["state"], write=False)
    prefix = f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}."
    if not checkpoint.manifest.bf16:  # a float32 run's weights are what a bfloat16 run's main weights start from
        shards = [replace(shard, key=shard.key.removeprefix(prefix)) for shard in shards]
    vocabulary, names = _flexible_keys(parameters), (*saved["state"], MAIN_WEIGHT)
    flexible = vocabulary | {f"{OPTIMIZER_PREFIX}{name}.{key}" for key in vocabulary for name in names}
    _check_tensors(checkpoint, reader, shards, flexible)
    reader.read_into(shards)


def _check_tensors(checkpoint: Checkpoint, reader: TensorReader, shards: list[Shard], flexible: set[str]) -> None:
    for shard in shards:
        if shard.key not in reader.tensors:
            raise UserError(f"{checkpoint.folder} lacks the tensor {shard.key}")
        shape, _ = reader.tensors[shard.key]
        same = shape[1:] == shard.global_shape[1:] if shard.key in flexible else shape == shard.global_shape
        if not same:
            raise UserError(f"{checkpoint.folder}: {shard.key} has shape {shape}, the model's is {shard.global_shape}")


def take_main_weights(
    checkpoint: Checkpoint, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime
) -> None:
    """Float32 main weights of bfloat16 parameters that were just loaded: from the parameters, or from the float32
    weights that those were rounded from.
    """
    with runtime.megatron(), torch.no_grad():
        optimizer.reload_model_params()
    if not checkpoint.manifest.bf16:
        on_all_ranks(runtime, lambda: _read_main_weights(checkpoint, policies, optimizer, runtime))


def _read_main_weights(
    checkpoint: Checkpoint, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime
) -> None:
    prefix = f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}."
    shards = optimizer_shards(optimizer, parameter_shards(policies, runtime), [], write=False)
    checkpoint.reader().read_into([replace(shard, key=shard.key.removeprefix(prefix)) for shard in shards])
