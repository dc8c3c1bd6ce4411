"""F4: save and load a run on all its ranks: what is in a checkpoint, who writes it, and that all ranks agree on faults.

A save is planned and written over a gloo group of its own, in the caller's thread or in one of its own; faults of any
rank become one RunFailure on all. docs/checkpoints.md says what is promised and how each promise is tested.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint import contents, ownership
from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.folder import DamagedCheckpoint, Manifest
from megatron_jq.checkpoint.shards import (
    MAIN_WEIGHT,
    OPTIMIZER_PREFIX,
    RANDOM_PREFIX,
    allocate_state,
    model_shards,
    optimizer_shards,
    optimizer_step,
    pieces,
    random_shards,
    restore_random_states,
    state_names,
)
from megatron_jq.checkpoint.torch_dist import Shard, ShardReader, write_shards
from megatron_jq.errors import RunFailure, UserError
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime, on_all_ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest keep_last (None: all) and the one with the highest metric keep_best."""

    keep_last: int | None = None
    keep_best: str | None = None


class CheckpointWriter:
    """Writes checkpoints of one run into one folder, one at a time.

    Every method is called on all ranks alike. asynchronous: `save` returns once the state is copied to host memory; the
    files are written while training goes on, by a thread with a process group of its own.
    """

    def __init__(
        self,
        save: Path,
        runtime: Runtime,
        deadline: timedelta,
        *,
        retention: Retention = Retention(),  # noqa: B008 (frozen)
        asynchronous: bool = False,
        tokenizer: Path | None = None,
    ):
        self._save, self._runtime, self._retention = save, runtime, retention
        self._asynchronous, self._tokenizer = asynchronous, tokenizer
        self._group = dist.new_group(backend="gloo", timeout=deadline)
        self._thread: threading.Thread | None = None
        self._outcome: list[BaseException | Path] = []

    @property
    def busy(self) -> bool:
        """A save is under way whose outcome has not been taken by `wait`."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """This rank's part of it has ended, well or not."""
        return self._thread is not None and not self._thread.is_alive()

    def save(self, policies: list[Policy], optimizer: MegatronOptimizer, manifest: Manifest) -> None:
        """Begin checkpoint manifest.step, and end it too unless asynchronous. RunFailure on every rank where it fails,
        also for one that was begun before.
        """
        self.wait()
        names, found = state_names(optimizer), pieces(policies, self._runtime)
        kind = {"state": names, "step": optimizer_step(optimizer)}
        manifest = replace(manifest, optimizer={**(manifest.optimizer or {}), **kind})
        states, _ = random_shards(self._runtime)
        shards = [
            *model_shards(found, write=True),
            *optimizer_shards(optimizer, found, names, write=True),
            *states,
        ]
        if not self._asynchronous:
            self._finished(self._attempt(shards, manifest))
            return
        shards = _copies(shards)

        def work() -> None:
            if self._runtime.device.type == "cuda":
                torch.cuda.set_device(self._runtime.device)  # a new thread begins on the node's first one
            self._outcome.append(self._attempt(shards, manifest))

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def save_weights(self, policies: list[Policy], manifest: Manifest) -> None:
        """`save` of weights alone, ended when it returns."""
        self.wait()
        self._finished(self._attempt(model_shards(pieces(policies, self._runtime), write=True), manifest))

    def wait(self) -> None:
        """Until nothing is under way. RunFailure on every rank where the save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._finished(self._outcome.pop())

    def _finished(self, outcome: BaseException | Path) -> None:
        if isinstance(outcome, BaseException):
            raise outcome

    def _attempt(self, shards: list[Shard], manifest: Manifest) -> BaseException | Path:
        try:
            return self._write(shards, manifest)
        except (OSError, RuntimeError, ValueError) as fault:
            return fault

    def _write(self, shards: list[Shard], manifest: Manifest) -> Path:
        """All ranks together; each step ends with their agreement on whether it went well."""
        step, rank = manifest.step, self._runtime.rank
        partial = self._save / f".{folders.folder_name(step)}.partial"
        try:
            self._all(step, lambda: folders.begin(self._save, step) if rank == 0 else None)
            self._all(step, lambda: write_shards(shards, partial, self._group))
            mine = self._all(step, lambda: folders.checksums(partial, [p.name for p in partial.glob(f"__{rank}_*")]))
            everyones = [None] * self._runtime.world_size
            dist.all_gather_object(everyones, mine, group=self._group)
            return self._all(step, lambda: self._commit(partial, manifest, everyones) if rank == 0 else None)
        except RunFailure:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk is not helped by what could not be finished
            raise

    def _commit(self, partial: Path, manifest: Manifest, everyones: list[dict]) -> Path:
        for rank, files in enumerate(everyones):
            for name in files:
                if not (partial / name).exists():
                    raise OSError(
                        0, f"rank {rank} wrote {name} where rank 0 does not see it: all nodes must share --save"
                    )
        if self._tokenizer is not None:
            contents.carry_tokenizer(self._tokenizer, partial)
        known, keep = {k: v for files in everyones for k, v in files.items()}, self._retention
        return ownership.finish(partial, manifest, known, keep_last=keep.keep_last, keep_best=keep.keep_best)

    def _all(self, step: int, work: Callable[[], T]) -> T:
        """work() on this rank; RunFailure on every rank where any rank's work failed."""
        result, fault = None, None
        try:
            result = work()
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            fault = reason if reason.startswith("rank ") else f"rank {self._runtime.rank}: {reason}"
        faults: list[str | None] = [None] * self._runtime.world_size
        dist.all_gather_object(faults, fault, group=self._group)
        first = next((f for f in faults if f is not None), None)
        if first is not None:
            raise RunFailure(
                f"checkpoint of step {step} in {self._save} could not be written: {first}; "
                "earlier checkpoints are untouched: mend this and start again with --resume"
            )
        return result


def _copies(shards: list[Shard]) -> list[Shard]:
    """The same shards over host memory of their own, which the next step does not change."""
    copied = [(shard, shard.data().to("cpu", copy=True)) for shard in shards]
    return [replace(shard, data=lambda data=data: data) for shard, data in copied]


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, verified."""

    folder: Path
    manifest: Manifest

    def reader(self) -> ShardReader:
        """Of its tensors."""
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
    load: Path, flag: str, runtime: Runtime, say: Callable[[str], None], *, missing_ok: bool = False
) -> Found | None:
    """The newest whole checkpoint in (or at) `load`, alike on all ranks; None where the folder holds none.

    Every file's checksum is verified, files shared out over ranks. Damaged checkpoints are said (on rank 0) and passed
    over. UserError on all ranks where `load` is no folder (unless missing_ok), or holds damaged checkpoints only.
    """
    names = lambda: folders.candidates(load, flag) if load.is_dir() or not missing_ok else []  # noqa: E731
    listed = [on_all_ranks(runtime, names, main_only=True)]
    dist.broadcast_object_list(listed, src=0)
    damage: list[str] = []
    for folder in listed[0]:
        manifest, fault = None, None
        try:
            manifest = folders.read_manifest(folder)
            folders.verify(folder, manifest, sorted(manifest.files)[runtime.rank :: runtime.world_size])
        except DamagedCheckpoint as error:
            fault = str(error)
        faults: list[str | None] = [None] * runtime.world_size
        dist.all_gather_object(faults, fault)
        first = next((f for f in faults if f is not None), None)
        if first is None:
            return Found(folder, manifest)
        damage.append(first)
        if runtime.is_main:
            say(f"warning: checkpoint {folder.name} is damaged and passed over: {first}")
    if damage:
        raise folders.none_found(load, damage, flag)
    return None


def check_architecture(found: Found, architecture: Architecture, vocab_size: int) -> None:
    """UserError that names every field in which the run's architecture differs from the checkpoint's."""
    saved, differing = found.manifest.architecture, []
    for name in (f.name for f in fields(Architecture)):
        if name in ("init_method_std", "moe_aux_loss_coeff", "vocab_size", "max_position_embeddings"):
            continue  # no part of the function that the weights are
        ours, theirs = getattr(architecture, name), saved.get(name)
        if name == "rope_scaling" and ours is not None:
            ours = vars(ours)
        if ours != theirs:
            differing.append(f"{name} is {theirs} there and {ours} here")
    if found.manifest.vocab_size != vocab_size:
        differing.append(f"vocab_size is {found.manifest.vocab_size} there and {vocab_size} here")
    if differing:
        remedy = "name it with --model, and give no other sizes"
        raise UserError(f"{found.folder} holds another architecture: {'; '.join(differing)}; {remedy}")


def load_weights(found: Found, policies: list[Policy], runtime: Runtime) -> None:
    """Fill the policies' parameters in place, whatever layout wrote them. UserError on every rank where it fails.

    Rows of the vocabulary's padding that the checkpoint lacks become zero.
    """
    parts = pieces(policies, runtime)
    flexible = {piece.sharded.key for some in parts.values() for piece in some if piece.rows_may_differ}
    shards = model_shards(parts, write=False)
    everyones: list[set[str]] = [set()] * runtime.world_size
    dist.all_gather_object(everyones, {shard.key for shard in shards})

    def read() -> None:
        reader = found.reader()
        theirs = {key for key in reader.tensors if not key.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))}
        extra = sorted(theirs - set().union(*everyones))
        if extra:
            raise UserError(f"{found.folder} holds tensors that the model lacks: {', '.join(extra[:5])}")
        _check_tensors(found, reader, shards, flexible)
        for shard in shards:
            if shard.key in flexible:
                shard.data().zero_()
        reader.read_into([_exact(shard, reader) for shard in shards])

    on_all_ranks(runtime, read)


def _exact(shard: Shard, reader: ShardReader) -> Shard:
    """A float32 parameter comes from the float32 main weight where a bfloat16 run left one."""
    main = f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}.{shard.key}"
    return replace(shard, key=main) if shard.dtype == torch.float32 and main in reader.tensors else shard


def load_optimizer(found: Found, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime) -> None:
    """Fill moments and float32 main weights in place, and the count of updates. UserError on every rank on faults."""
    on_all_ranks(runtime, lambda: _read_optimizer(found, policies, optimizer, runtime))


def load_random_states(found: Found, runtime: Runtime, layout: dict[str, int]) -> None:
    """Restore this rank's random states where the checkpoint's layout is this run's; leave them otherwise."""
    if found.manifest.layout != layout:
        return
    shards, states = random_shards(runtime)
    on_all_ranks(runtime, lambda: ShardReader(found.folder).read_into(shards))
    restore_random_states(states, runtime)


def _read_optimizer(found: Found, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime) -> None:
    saved = found.manifest.optimizer
    if saved is None:
        raise UserError(f"{found.folder} holds weights alone; --finetune starts a new run from them")
    allocate_state(optimizer, saved["state"], saved["step"])
    reader, parts = ShardReader(found.folder), pieces(policies, runtime)
    shards = optimizer_shards(optimizer, parts, saved["state"], write=False)
    prefix = f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}."
    if not found.manifest.bf16:  # a float32 run's weights are what a bfloat16 run's main weights start from
        shards = [replace(shard, key=shard.key.removeprefix(prefix)) for shard in shards]
    flexible = {
        f"{OPTIMIZER_PREFIX}{name}.{piece.sharded.key}"
        for some in parts.values()
        for piece in some
        for name in (*saved["state"], MAIN_WEIGHT)
        if piece.rows_may_differ
    } | {piece.sharded.key for some in parts.values() for piece in some if piece.rows_may_differ}
    _check_tensors(found, reader, shards, flexible)
    reader.read_into(shards)


def _check_tensors(found: Found, reader: ShardReader, shards: list[Shard], flexible: set[str]) -> None:
    for shard in shards:
        if shard.key not in reader.tensors:
            raise UserError(f"{found.folder} lacks the tensor {shard.key}")
        shape, _ = reader.tensors[shard.key]
        same = shape[1:] == shard.global_shape[1:] if shard.key in flexible else shape == shard.global_shape
        if not same:
            raise UserError(f"{found.folder}: {shard.key} has shape {shape}, the model's is {shard.global_shape}")


def take_main_weights(found: Found, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime) -> None:
    """Float32 main weights of bfloat16 parameters that were just loaded: from the parameters, or from the float32
    weights that those were rounded from.
    """
    with runtime.megatron(), torch.no_grad():
        optimizer.reload_model_params()
    if not found.manifest.bf16:
        on_all_ranks(runtime, lambda: _read_main_weights(found, policies, optimizer, runtime))


def _read_main_weights(found: Found, policies: list[Policy], optimizer: MegatronOptimizer, runtime: Runtime) -> None:
    prefix = f"{OPTIMIZER_PREFIX}{MAIN_WEIGHT}."
    shards = optimizer_shards(optimizer, pieces(policies, runtime), [], write=False)
    found.reader().read_into([replace(shard, key=shard.key.removeprefix(prefix)) for shard in shards])
