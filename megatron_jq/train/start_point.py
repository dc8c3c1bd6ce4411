"""F4: where a run begins: at step 0, where it stopped before (--resume), or from another checkpoint (--load)."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_jq.architecture_files import has_weights
from megatron_jq.checkpoint.folder import TRACKER, left_aside, none_found, saved_steps
from megatron_jq.checkpoint.hugging_face_weights import is_hugging_face_folder, open_folder
from megatron_jq.checkpoint.loader import Checkpoint, find_checkpoint
from megatron_jq.config import Config
from megatron_jq.errors import UserError
from megatron_jq.parallel.runtime import Runtime, on_all_ranks
from megatron_jq.train.run_directory import METRICS, check_settings, save_folder


@dataclass(frozen=True)
class StartPoint:
    """checkpoint: the one to load. resumed: it is this run's own; otherwise metrics begin again. notes: what else the
    user should know.
    """

    checkpoint: Checkpoint | None
    step: int  # steps done
    resumed: bool
    weights_only: bool
    notes: tuple[str, ...] = ()

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl that stays."""
        return (self.checkpoint.manifest.metrics_bytes or 0) if self.checkpoint is not None and self.resumed else 0

    def described(self, seed: int, train_iters: int) -> str:
        """Lines for the user: where the weights come from, and what else there is to know."""
        return "\n".join((self._origin(seed, train_iters), *self.notes))

    def _origin(self, seed: int, train_iters: int) -> str:
        if self.checkpoint is None:
            return f"begins with random weights (--seed {seed})"
        if self.weights_only:
            return f"begins with the weights of {self.checkpoint.description}"
        done = f"goes on from {self.checkpoint.folder}: {self.step} steps are done"
        return done if self.step < train_iters else f"{done}, nothing is left to do (--train-iters {train_iters})"


def find_start_point(config: Config, runtime: Runtime) -> StartPoint:
    """Look for the checkpoint to begin from; all ranks alike. UserError for a --load that holds none, or where the
    settings of the checkpoint to resume from differ from these.

    The folder of checkpoints holds this run's alone: RunFolders.open has seen to that.
    """
    c, folder, notes = config.checkpoint, save_folder(config), ()
    if c.resume:
        checkpoint = find_checkpoint(folder, "--resume: --save", runtime, print, missing_ok=True)
        if checkpoint is not None:
            on_all_ranks(runtime, lambda: check_settings(checkpoint.manifest, config), main_only=True)
            notes = on_all_ranks(runtime, lambda: _aside(checkpoint, folder), main_only=True) or ()
            return StartPoint(checkpoint, checkpoint.manifest.step, resumed=True, weights_only=False, notes=notes)
        notes = on_all_ranks(runtime, lambda: _lost(config, folder), main_only=True) or ()
    folder_flag = _folder_with_weights(config, runtime)
    if folder_flag is not None:
        checkpoint = open_folder(*folder_flag, runtime)
        return StartPoint(checkpoint, 0, resumed=False, weights_only=True, notes=notes)
    if c.load is not None:
        checkpoint = find_checkpoint(Path(c.load), "--load", runtime, print)
        if checkpoint is None:
            raise none_found(Path(c.load), [], "--load")
        weights_only = c.finetune or checkpoint.manifest.optimizer is None
        step = 0 if weights_only else checkpoint.manifest.step
        if not weights_only and step >= config.training.train_iters:
            raise UserError(
                f"--load {c.load}: its run is done ({step} steps, --train-iters {config.training.train_iters}), so "
                "nothing would be trained: --finetune begins a new run at step 0 with its weights, a larger "
                "--train-iters continues it"
            )
        return StartPoint(checkpoint, step, resumed=False, weights_only=weights_only, notes=notes)
    return StartPoint(None, 0, resumed=c.resume, weights_only=False, notes=notes)


def _folder_with_weights(config: Config, runtime: Runtime) -> tuple[Path, str] | None:
    """The Hugging Face folder whose weights a new run begins with, and the flag that names it, as rank 0 sees it.

    --load goes first: with it, --model says the architecture alone.
    """

    def look() -> tuple[Path, str] | None:
        load, model = config.checkpoint.load, config.model.model
        if load is not None:
            is_one = is_hugging_face_folder(Path(load)) and not saved_steps(Path(load))
            return (Path(load), "--load") if is_one else None
        return (Path(model), "--model") if has_weights(model) else None

    seen = [on_all_ranks(runtime, look, main_only=True)]
    dist.broadcast_object_list(seen, src=0)
    return seen[0]


def _aside(checkpoint: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Checkpoints that the run does not go on from: of later steps, or of a branch that it left before."""
    later = [step for step in saved_steps(folder) if step > checkpoint.manifest.step]
    steps = sorted({*left_aside(folder, "--save"), *later})
    if not steps:
        return ()
    those = f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
    return (
        f"not taken up: the checkpoint{'s' if len(steps) > 1 else ''} of {those}, which this run does not continue; "
        f"--keep-last removes them first; to go on from one, write its step into {folder / TRACKER}",
    )


def _lost(config: Config, folder: Path) -> tuple[str, ...]:
    """Steps on record that no checkpoint holds."""
    metrics = Path(config.training.run_dir) / METRICS
    steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0  # a device has no end
    return (f"no checkpoint in {folder}: the {steps} recorded steps are done again",) if steps else ()
