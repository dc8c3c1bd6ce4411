"""F4: where a run begins: at step 0, where it stopped before (--resume), or from another checkpoint (--load)."""

from dataclasses import dataclass
from pathlib import Path

from megatron_jq.checkpoint.folder import TRACKER, left_aside, none_found, saved_steps
from megatron_jq.checkpoint.store import Found, find_checkpoint
from megatron_jq.config import Config
from megatron_jq.parallel.runtime import Runtime, together
from megatron_jq.train.run_directory import METRICS, check_settings, save_folder


@dataclass(frozen=True)
class Beginning:
    """found: the checkpoint to load. resumed: it is this run's own; otherwise metrics begin anew. notes: what else the
    user should know.
    """

    found: Found | None
    step: int  # steps done
    resumed: bool
    weights_only: bool
    notes: tuple[str, ...] = ()

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl that stays."""
        return (self.found.manifest.metrics_bytes or 0) if self.found is not None and self.resumed else 0

    @property
    def told(self) -> str | None:
        """Lines for the user; None where a run begins from nothing."""
        lines = [line for line in (self._origin, *self.notes) if line is not None]
        return "\n".join(lines) if lines else None

    @property
    def _origin(self) -> str | None:
        if self.found is None:
            return None
        if self.weights_only:
            return f"begins with the weights of {self.found.folder}"
        return f"goes on from {self.found.folder}: {self.step} steps are done"


def find_beginning(config: Config, runtime: Runtime) -> Beginning:
    """Look for the checkpoint to begin from; all ranks alike. UserError for a --load that holds none, or where the
    settings of the checkpoint to resume from differ from these.

    The folder of checkpoints holds this run's alone: RunFolders.open has seen to that.
    """
    c, folder, notes = config.checkpoint, save_folder(config), ()
    if c.resume:
        found = find_checkpoint(folder, "--resume: --save", runtime, print, missing_ok=True)
        if found is not None:
            together(runtime, lambda: check_settings(found.manifest, config), main_only=True)
            notes = together(runtime, lambda: _aside(found, folder), main_only=True) or ()
            return Beginning(found, found.manifest.step, resumed=True, weights_only=False, notes=notes)
        notes = together(runtime, lambda: _lost(config, folder), main_only=True) or ()
    if c.load is not None:
        found = find_checkpoint(Path(c.load), "--load", runtime, print)
        if found is None:
            raise none_found(Path(c.load), [], "--load")
        weights_only = c.finetune or found.manifest.optimizer is None
        step = 0 if weights_only else found.manifest.step
        return Beginning(found, step, resumed=False, weights_only=weights_only, notes=notes)
    return Beginning(None, 0, resumed=c.resume, weights_only=False, notes=notes)


def _aside(found: Found, folder: Path) -> tuple[str, ...]:
    """Checkpoints that the run does not go on from: of later steps, or of a branch that it left before."""
    later = [step for step in saved_steps(folder) if step > found.manifest.step]
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
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return (f"no checkpoint in {folder}: the {steps} recorded steps are done again",) if steps else ()
