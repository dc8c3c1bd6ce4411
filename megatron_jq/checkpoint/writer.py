"""F4: save a run's checkpoint on all its ranks, in the caller's thread or in one of its own.

A save is planned and written over a gloo group of its own; any rank's error becomes one RunFailure on all.
docs/checkpoints.md says what is promised and how each promise is tested.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jq.checkpoint import contents, ownership
from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint.folder import Manifest
from megatron_jq.checkpoint.shards import (
    model_shards,
    optimizer_shards,
    optimizer_step,
    parameter_shards,
    random_shards,
    state_names,
)
from megatron_jq.checkpoint.torch_dist import Shard, write_shards
from megatron_jq.errors import RunFailure
from megatron_jq.model.policy import Policy
from megatron_jq.parallel.runtime import Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest keep_last (None: all) and the one with the highest metric keep_best."""

    keep_last: int | None = None
    keep_best: str | None = None


class CheckpointWriter:
    """Writes checkpoints of one run into one folder, one at a time.

    Every method is called on all ranks alike. asynchronous: `save` returns once the state is copied to host memory; the
    files are written while training continues, by a thread with a process group of its own.
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
        group = dist.new_group(backend="gloo", timeout=deadline)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._thread: threading.Thread | None = None
        self._outcome: list[BaseException | Path | None] = []

    @property
    def busy(self) -> bool:
        """Whether a save is under way whose outcome has not been taken by `wait`."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """Whether this rank's share of the save has ended, well or not."""
        return self._thread is not None and not self._thread.is_alive()

    def save(self, policies: list[Policy], optimizer: MegatronOptimizer, manifest: Manifest) -> None:
        """Begin checkpoint manifest.step, and end it too unless asynchronous. RunFailure on every rank where it fails,
        also for one that was begun before.
        """
        self.wait()
        names, parameters = state_names(optimizer), parameter_shards(policies, self._runtime)
        kind = {"state": names, "step": optimizer_step(optimizer)}
        manifest = replace(manifest, optimizer={**(manifest.optimizer or {}), **kind})
        states, _ = random_shards(self._runtime)
        shards = [
            *model_shards(parameters, write=True),
            *optimizer_shards(optimizer, parameters, names, write=True),
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
        self._finished(self._attempt(model_shards(parameter_shards(policies, self._runtime), write=True), manifest))

    def wait(self) -> None:
        """Until nothing is under way. RunFailure on every rank where the save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._finished(self._outcome.pop())

    def _finished(self, outcome: BaseException | Path | None) -> None:
        if isinstance(outcome, BaseException):
            raise outcome

    def _attempt(self, shards: list[Shard], manifest: Manifest) -> BaseException | Path | None:
        try:
            return self._write(shards, manifest)
        except (OSError, RuntimeError, ValueError) as error:
            return error

    def _write(self, shards: list[Shard], manifest: Manifest) -> Path | None:
        """Write on all ranks; each stage ends with their agreement on whether it went well."""
        step, rank = manifest.step, self._runtime.rank
        partial = self._save / f".{folders.folder_name(step)}.partial"
        try:
            self._all(step, lambda: folders.begin(self._save, step) if rank == 0 else None)
            self._all(step, lambda: write_shards(shards, partial, self._group))
            local = self._all(step, lambda: folders.checksums(partial, [p.name for p in partial.glob(f"__{rank}_*")]))
            by_rank: list[dict] = [{}] * self._runtime.world_size
            dist.all_gather_object(by_rank, local, group=self._group)
            return self._all(step, lambda: self._commit(partial, manifest, by_rank) if rank == 0 else None)
        except RunFailure:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk is not helped by what could not be finished
            raise

    def _commit(self, partial: Path, manifest: Manifest, by_rank: list[dict]) -> Path:
        for rank, files in enumerate(by_rank):
            for name in files:
                if not (partial / name).exists():
                    raise OSError(
                        0, f"rank {rank} wrote {name} where rank 0 does not see it: all nodes must share --save"
                    )
        if self._tokenizer is not None:
            contents.carry_tokenizer(self._tokenizer, partial)
        known, keep = {k: v for files in by_rank for k, v in files.items()}, self._retention
        return ownership.finish(partial, manifest, known, keep_last=keep.keep_last, keep_best=keep.keep_best)

    def _all(self, step: int, work: Callable[[], T]) -> T:
        """work() on this rank; RunFailure on every rank where any rank's work failed."""
        result, error_text = None, None
        try:
            result = work()
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            error_text = reason if reason.startswith("rank ") else f"rank {self._runtime.rank}: {reason}"
        errors: list[str | None] = [None] * self._runtime.world_size
        dist.all_gather_object(errors, error_text, group=self._group)
        first = next((text for text in errors if text is not None), None)
        if first is not None:
            raise RunFailure(
                f"checkpoint of step {step} in {self._save} could not be written: {first}; "
                "earlier checkpoints are untouched: fix this and start again with --resume"
            )
        return cast(T, result)


def _copies(shards: list[Shard]) -> list[Shard]:
    """The same shards over host memory of their own, which the next step does not change."""
    copied = [(shard, shard.data().to("cpu", copy=True)) for shard in shards]
    return [replace(shard, data=lambda data=data: data) for shard, data in copied]
