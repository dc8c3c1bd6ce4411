"""F4: where a run begins: at step 0, where it stopped before (--resume), or from another checkpoint (--load)."""

from dataclasses import dataclass
from pathlib import Path

from megatron_jq.checkpoint.folder import none_found
from megatron_jq.checkpoint.store import Found, find_checkpoint
from megatron_jq.config import SETTINGS, Config, load_toml
from megatron_jq.errors import UserError
from megatron_jq.parallel.runtime import Runtime, agree

#: Settings that a run may change when it is taken up again: they change its speed, its length or what it shows, and
#: results within rounding at the most. Any other change is a new run, which --load begins.
_FREE = {
    "train_iters", "share_prompts", "micro_batch_size", "max_tokens_per_micro_batch", "pad_sequences_to_multiple_of",
    "run_dir", "log_interval", "sample_interval", "eval_interval", "tensorboard", "score_with", "score_check_interval",
    "score_mismatch_alarm", "rollout_batch_size", "data_cache_path",
}  # fmt: skip
_FREE_GROUPS = ("parallel", "checkpoint")


@dataclass(frozen=True)
class Beginning:
    """found: the checkpoint to load. resumed: it is this run's own; otherwise metrics begin anew."""

    found: Found | None
    step: int  # steps done
    resumed: bool
    weights_only: bool

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl that stays."""
        return (self.found.manifest.metrics_bytes or 0) if self.found is not None and self.resumed else 0

    @property
    def told(self) -> str | None:
        """A line for the user; None where a run begins from nothing."""
        if self.found is None:
            return None
        if self.weights_only:
            return f"begins with the weights of {self.found.folder}"
        return f"goes on from {self.found.folder}: {self.step} steps are done"


def save_folder(config: Config) -> Path:
    return Path(config.checkpoint.save or Path(config.training.run_dir) / "checkpoints")


def find_beginning(config: Config, runtime: Runtime) -> Beginning:
    """Look for the checkpoint to begin from; all ranks alike. UserError for a --load that holds none, or where the
    run directory's own settings differ from these.
    """
    c, folder = config.checkpoint, save_folder(config)
    if c.resume:
        agree(runtime, changed_settings(config) if runtime.is_main else None)
        found = find_checkpoint(folder, "--resume: --save", runtime, print, missing_ok=True)
        if found is not None:
            return Beginning(found, found.manifest.step, resumed=True, weights_only=False)
    if c.load is not None:
        found = find_checkpoint(Path(c.load), "--load", runtime, print)
        if found is None:
            raise none_found(Path(c.load), [], "--load")
        weights_only = c.finetune or found.manifest.optimizer is None
        return Beginning(found, 0 if weights_only else found.manifest.step, resumed=False, weights_only=weights_only)
    return Beginning(None, 0, resumed=c.resume, weights_only=False)


def changed_settings(config: Config) -> str | None:
    """What to tell a user who takes up a run with other settings than it began with; None where none differ."""
    path = Path(config.training.run_dir) / "config.toml"
    if not path.exists() or path.stat().st_size == 0:  # empty: the run was killed as it made the folder its own
        return None
    try:
        before = load_toml(path)
    except UserError as fault:
        return f"--resume: {fault}"
    changed = [
        f"--{name.replace('_', '-')} was {_value(before, name)} and is {_value(config, name)}"
        for name, (group, _) in SETTINGS.items()
        if group not in _FREE_GROUPS and name not in _FREE and _value(before, name) != _value(config, name)
    ]
    if not changed:
        return None
    return f"--resume {path.parent}: {'; '.join(changed)}; go on with the old values, or begin a new run with --load"


def _value(config: Config, name: str):
    return getattr(getattr(config, SETTINGS[name][0]), name)
