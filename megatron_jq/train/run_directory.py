"""F4: a run's two folders, its directory and that of its checkpoints, from the first look to the end of its process.

No Megatron and no collective: rank 0 alone is in charge of them.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_jq.checkpoint.folder import Manifest, readable_manifest, remove_partial, saved_steps
from megatron_jq.checkpoint.lineage import Branches, new_branch, resumed_branches
from megatron_jq.checkpoint.ownership import check_save, claim_save
from megatron_jq.checkpoint.run_files import Lock, Run, own_run
from megatron_jq.config import Config, load_toml, settings_of_text, to_toml
from megatron_jq.errors import UserError
from megatron_jq.files import reason, write_synced
from megatron_jq.train.resume_rules import changed

#: What a run records, in its directory.
METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


def save_folder(config: Config) -> Path:
    return Path(config.checkpoint.save or Path(config.training.run_dir) / "checkpoints")


class RunFolders:
    """`open` before anything is read of them, `claim` before the first step, `close` at the end.

    Nothing but the two folders themselves, a lock in each and the run's id is written before `claim`: a folder whose
    run was refused for another reason stays free.
    """

    def __init__(self, config: Config):
        self._config, self._resume = config, config.checkpoint.resume
        self.run_dir, self.save = Path(config.training.run_dir), save_folder(config)
        self.run: Run | None = None
        self._locks: list[Lock] = []

    def open(self) -> list[str]:
        """Make the folders, lock them, and see that they are this run's or nobody's. Returns what to tell the user.

        UserError where a folder cannot be written, is in use, or belongs to another run; and for a run that is resumed
        with other settings than it began with.
        """
        with writing("--run-dir", self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _try_to_write(self.run_dir)
        self._lock(self.run_dir, "--run-dir")
        self._check_run_dir()
        if self._resume and (refusal := changed_settings(self._config)) is not None:
            raise UserError(refusal)
        with writing("--save", self.save):
            _try_to_write(self.save)
        with writing("--run-dir", self.run_dir):
            self.run = own_run(self.run_dir)
        self._lock(self.save, "--save")
        notes = check_save(self.save, self.run, resume=self._resume, difference=self._difference)
        if self._resume:
            self._check_moved_save()
        return [*(lock.warning for lock in self._locks if lock.warning is not None), *notes]

    def claim(self) -> None:
        """Make both folders this run's. UserError where a folder cannot be written, or another run was quicker."""
        with writing("--save", self.save):
            assert self.run is not None, "open comes first"
            claim_save(self.save, self.run)
        claim_run_directory(self.run_dir, self._config, resume=self._resume)
        remove_partial(self.save)

    def branches(self, parent: Manifest | None) -> Branches:
        """Of what the run saves from now on. parent: the checkpoint that it resumes from; None: it begins."""
        if parent is None:
            return [new_branch(0)]
        manifests = [readable_manifest(path) for path in saved_steps(self.save).values()]
        return resumed_branches(parent, [manifest for manifest in manifests if manifest is not None])

    def close(self) -> None:
        for lock in self._locks:
            lock.release()
        self._locks = []

    def _lock(self, folder: Path, flag: str) -> None:
        self._locks.append(Lock(folder, flag, f"--run-dir {self.run_dir.resolve()}"))

    def _check_run_dir(self) -> None:
        with writing("--run-dir", self.run_dir):
            if not self._resume and ((self.run_dir / "config.toml").exists() or (self.run_dir / METRICS).exists()):
                raise _taken(self.run_dir)
        with writing("--run-dir", self.run_dir / METRICS):
            if (self.run_dir / METRICS).exists():
                open(self.run_dir / METRICS, "ab").close()
        with writing("--run-dir", self.run_dir / TENSORBOARD):
            if (self.run_dir / TENSORBOARD).exists():
                _try_to_write(self.run_dir / TENSORBOARD)

    def _difference(self, manifest: Manifest) -> str | None:
        """Why a checkpoint without a run's id is not this run's; None where it is."""
        if manifest.config is None:
            return "which no run wrote"
        differences = changed_since(manifest, self._config)
        return f"older than runs' ids, with other settings ({'; '.join(differences)})" if differences else None

    def _check_moved_save(self) -> None:
        """UserError where the run's checkpoints are in the folder that it used before, and not in this one."""
        before = _settings_before(self.run_dir)
        if before is None or saved_steps(self.save):
            return
        old = Path(before.checkpoint.save or self.run_dir / "checkpoints")
        there = saved_steps(old) if old.is_dir() else {}
        if any(self._wrote(readable_manifest(path)) for path in there.values()):
            raise UserError(
                f"--resume: this run's checkpoints are in {old} (newest: step {max(there)}), and --save {self.save} "
                f"has none; give --save {old}, or move them"
            )

    def _wrote(self, manifest: Manifest | None) -> bool:
        if manifest is None or manifest.run is None:
            return manifest is not None and self._difference(manifest) is None
        assert self.run is not None, "open comes first"
        return manifest.run["id"] == self.run.id


def changed_settings(config: Config) -> str | None:
    """What to tell a user who resumes a run with other settings than it began with; None where none differ."""
    run_dir = Path(config.training.run_dir)
    try:
        before = _settings_before(run_dir)
    except UserError as error:
        return f"--resume: {error}"
    differences = [] if before is None else changed(before, config)
    return _refusal(str(run_dir), differences) if differences else None


def changed_since(manifest: Manifest, config: Config) -> list[str]:
    """A line per fixed setting that differs from those of the run that wrote a checkpoint. UserError: unreadable."""
    if manifest.config is None:
        return []
    return changed(settings_of_text(manifest.config, f"the settings in the checkpoint of step {manifest.step}"), config)


def check_settings(manifest: Manifest, config: Config) -> None:
    """UserError where a run is resumed from a checkpoint with other settings than it was saved with."""
    differences = changed_since(manifest, config)
    if differences:
        raise UserError(_refusal(f"from step {manifest.step}", differences))


def _refusal(what: str, differences: list[str]) -> str:
    return (
        f"--resume {what}: {'; '.join(differences)}; keep the old values (--config RUN_DIR/config.toml has them), or "
        "begin a new run with --load"
    )


def _settings_before(run_dir: Path) -> Config | None:
    path = run_dir / "config.toml"
    if not path.exists() or path.stat().st_size == 0:  # empty: the run was killed as it made the folder its own
        return None
    return load_toml(path)


def claim_run_directory(run_dir: Path, config: Config, *, resume: bool = False) -> None:
    """Write config.toml, which makes the folder this run's. UserError where it cannot be written, or where another run
    was quicker.
    """
    partial, path = run_dir / ".config.toml", run_dir / "config.toml"
    with writing("--run-dir", run_dir):
        if resume:
            write_synced(partial, to_toml(config))
            os.replace(partial, path)
            return
        try:
            with open(path, "x", encoding="utf-8"):
                pass  # of two runs that begin at once, one has it
        except FileExistsError as fault:
            raise _taken(run_dir) from fault
        try:
            write_synced(partial, to_toml(config))
            os.replace(partial, path)
        except OSError:
            path.unlink()  # empty: the folder stays free
            raise


@contextlib.contextmanager
def writing(flag: str, folder: Path) -> Iterator[None]:
    """An OSError in the block becomes a UserError that names the flag."""
    try:
        yield
    except OSError as fault:
        raise UserError(f"{flag} {folder} cannot be written: {reason(fault)}; name a folder that can") from fault


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as scratch:
        scratch.write(b"x")


def _taken(run_dir: Path) -> UserError:
    return UserError(
        f"--run-dir {run_dir} holds another run; give --resume to go on with it, name a new folder, or remove that one"
    )
