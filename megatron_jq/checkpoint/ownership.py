"""F4: whose a folder of checkpoints is. A run takes up, overwrites and removes its own checkpoints alone.

    RUN_DIR/run_id     the run's id, made once
    SAVE/run.json      the id and the directory of the run that saves here, and where SAVE was then
    SAVE/.lock         locked by the process that trains (RUN_DIR/.lock likewise)

Every manifest holds the id too, so that a checkpoint that is copied or moved is still known. A lock keeps out a second
process of the same run, and ends with its process; a claim keeps out other runs, also while nobody trains.
"""

import errno
import fcntl
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_jq.checkpoint.folder import (
    Manifest,
    commit,
    folder_name,
    leftovers,
    prune,
    readable_manifest,
    saved_steps,
)
from megatron_jq.errors import UserError
from megatron_jq.files import reason, sync, write_synced

RUN_ID, CLAIM, LOCK = "run_id", "run.json", ".lock"
#: Folder beside a run's checkpoints with what --grpo-kl-beta needs: one, with number 0, whatever step the run began at.
REFERENCE = "reference"


@dataclass(frozen=True)
class Run:
    """directory: its absolute path, for people and to tell a copy."""

    id: str
    directory: str

    def __str__(self) -> str:
        return f"run {self.id[:8]} in {self.directory}"


@dataclass(frozen=True)
class Claim:
    """SAVE/run.json: a run, and the folder's absolute path when it was claimed."""

    id: str
    directory: str
    save: str

    @property
    def run(self) -> Run:
        return Run(self.id, self.directory)


class Lock:
    """A folder that this process alone uses, until `release` or its end. warning: why that could not be made sure."""

    def __init__(self, folder: Path, flag: str, holder: str):
        """UserError where another process holds it, or the folder cannot be written."""
        self.warning: str | None = None
        try:
            self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{flag} {folder} cannot be written: {reason(error)}; name a folder that can") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.warning = f"warning: {flag} {folder} cannot be locked ({reason(error)}): that no other process "
                self.warning += "trains there was not checked"
                return
            other = os.read(self._file, 1000).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise UserError(
                f"{flag} {folder} is in use by {other}; {_way_out(other, holder)}"
            ) from error
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}, {holder}\n".encode())

    def release(self) -> None:
        os.close(self._file)


def own_run(run_dir: Path) -> Run:
    """The run of a directory, which gets an id where it has none. UserError where its file holds none."""
    run = read_run(run_dir)
    if run is None:
        _write_once(run_dir / RUN_ID, f"{uuid.uuid4().hex}\n", tag=str(os.getpid()))
        run = read_run(run_dir)
    return run


def read_run(run_dir: Path) -> Run | None:
    """The run of a directory; None where it has none. UserError where its file holds no id."""
    path = run_dir / RUN_ID
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--run-dir {path} cannot be read: {reason(error) if isinstance(error, OSError) else error}"
        ) from error
    if re.fullmatch("[0-9a-f]{32}", text) is None:
        raise UserError(
            f'--run-dir {path} does not hold a run\'s id; copy it from the "run" of a checkpoint.json of this run, or '
            "remove it and begin a new run"
        )
    return Run(text, str(run_dir.resolve()))


def read_claim(save: Path) -> Claim | None:
    """None where nobody has claimed the folder. UserError where the claim cannot be read."""
    path = save / CLAIM
    try:
        return Claim(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--save {path} cannot be read: {error}; remove it if no run that is to go on saves here"
        ) from error


def check_save(save: Path, run: Run, *, resume: bool, difference: Callable[[Manifest], str | None]) -> list[str]:
    """Whether `run` may save into the folder, before anything in it is changed. Returns what to tell the user.

    difference: of a checkpoint that is older than ids, why it is not this run's; None where it is. UserError where the
    folder is another run's, holds another's checkpoints, or is also used by a copy of this run's directory; and for a
    run that does not resume, where it holds any.
    """
    claim = read_claim(save)
    if claim is not None and claim.id != run.id and not _is_stale(claim, save):
        raise _taken(save, f"belongs to {claim.run}{_listed(saved_steps(save))}", claim.run)
    claimed = claim is not None and claim.id == run.id
    if claimed:
        _refuse_copy(claim, save, run)
    owned, notes = _owned_steps(save, run, difference, notes_wanted=not claimed)
    if saved_steps(save) and not resume:
        whose = f"of {run} already" if owned else "that cannot be read"
        raise UserError(
            f"--save {save} holds checkpoints {whose}{_listed(saved_steps(save))}; give --resume to continue their "
            "run, name another folder, or remove them"
        )
    inside = Path(run.directory) in save.resolve().parents
    unknown = [path.name for path in leftovers(save)] + [
        path.name for step, path in saved_steps(save).items() if step not in owned
    ]
    if unknown and not (claimed or inside or owned):
        raise UserError(
            f"--save {save} holds {', '.join(sorted(unknown)[:4])}, and not whose that is; name another folder, or "
            "remove them if nothing writes there"
        )
    return notes


def claim_save(save: Path, run: Run) -> None:
    """Make the folder this run's, for others to see. Again after a move: then with the new places.

    UserError where another run was quicker. Only after `check_save`.
    """
    claim, wanted = read_claim(save), Claim(run.id, run.directory, str(save.resolve()))
    text = json.dumps(asdict(wanted), indent=1) + "\n"
    if claim == wanted:
        return
    if claim is not None and claim.id != run.id:
        if not _is_stale(claim, save):
            raise _taken(save, f"was claimed by {claim.run} a moment ago", claim.run)
        (save / CLAIM).unlink(missing_ok=True)
        claim = None
    if claim is None:
        if not _write_once(save / CLAIM, text, tag=run.id):
            other = read_claim(save).run
            raise _taken(save, f"was claimed by {other} a moment ago", other)
        return
    partial = save / f".{CLAIM}.{run.id}"
    write_synced(partial, text)
    os.replace(partial, save / CLAIM)
    sync(save)


def finish(
    partial: Path,
    manifest: Manifest,
    files: Mapping[str, dict[str, Any]] | None = None,
    *,
    keep_last: int | None = None,
    keep_best: str | None = None,
) -> Path:
    """Give a written checkpoint its name, then remove what is no longer kept. OSError where the folder, or a checkpoint
    of this name, has become another run's meanwhile.
    """
    save = partial.parent
    _check_still_owned(save, save / folder_name(manifest.step), manifest)
    final = commit(partial, manifest, files)
    prune(save, keep_last=keep_last, keep_best=keep_best, newest=manifest)
    return final


def _check_still_owned(save: Path, final: Path, manifest: Manifest) -> None:
    if manifest.run is None:
        return
    try:
        claim = read_claim(save)
    except UserError as error:  # the ranks that write together know no other error
        raise OSError(0, str(error)) from error
    if claim is not None and claim.id != manifest.run["id"]:
        raise OSError(0, f"the folder belongs to {claim.run} now")
    present = readable_manifest(final) if final.exists() else None
    if present is not None and present.run is not None and present.run["id"] != manifest.run["id"]:
        raise OSError(0, f"{final.name} there is of {Run(**present.run)}")


def _owned_steps(
    save: Path, run: Run, difference: Callable[[Manifest], str | None], *, notes_wanted: bool
) -> tuple[list[int], list[str]]:
    """Steps of the run's own checkpoints, and notes. UserError for the first one of another run. What cannot be read is
    neither.
    """
    owned, older = [], []
    folders = [*saved_steps(save).items()]
    if (save / REFERENCE).is_dir():
        folders += [(None, path) for path in saved_steps(save / REFERENCE).values()]
    for step, folder in folders:
        manifest = readable_manifest(folder)
        if manifest is None:
            continue
        if manifest.run is not None and manifest.run["id"] != run.id:
            other = Run(**manifest.run)
            raise _taken(save, f"holds {folder.name} of {other}{_listed(saved_steps(save))}", other)
        if manifest.run is None:
            why = difference(manifest)
            if why is not None:
                raise _taken(save, f"holds {folder.name}, {why}", None)
            older.append(folder.name)
        if step is not None:
            owned.append(step)
    notes = []
    if older and notes_wanted:
        notes = [
            f"{', '.join(sorted(older))} in {save}: older than runs' ids; taken for this run's, since its settings are "
            "the same, and its data is compared when it is loaded"
        ]
    return owned, notes


def _is_stale(claim: Claim, save: Path) -> bool:
    """A claim without a run: its directory is gone, and it saved nothing."""
    there = read_run(Path(claim.directory))
    return (there is None or there.id != claim.id) and not saved_steps(save) and not leftovers(save)


def _refuse_copy(claim: Claim, save: Path, run: Run) -> None:
    """A run directory may move, and so may its folder of checkpoints; two directories may not share the folder."""
    if claim.directory == run.directory or claim.save != str(save.resolve()):
        return
    there = read_run(Path(claim.directory))
    if there is not None and there.id == run.id and not os.path.samefile(claim.directory, run.directory):
        raise UserError(
            f"--save {save} belongs to {claim.run}, and --run-dir {run.directory} is a copy of that: two runs would "
            f"mix; give the copy a --save of its own (a copy of the folder will do), or remove the other directory"
        )


def _way_out(other: str, holder: str) -> str:
    """What to do about a folder that another process holds. holder: this process's words for itself."""
    if other.endswith(holder):
        return "wait until that has ended, or name another folder"
    return "that is another run: name another folder"


def _taken(save: Path, what: str, other: Run | None) -> UserError:
    fix = "give this run a --save of its own"
    if other is not None and Path(other.directory).is_dir():
        fix += f", or continue that one with --run-dir {other.directory} --resume"
    elif other is not None:
        fix = f"its run directory {other.directory} is gone; to go on from these checkpoints, give --load {save}, and a"
        fix += " new --run-dir and --save"
        return UserError(f"--save {save} {what}: {fix} (docs/checkpoints.md, by hand)")
    return UserError(f"--save {save} {what}: it is not this run's; {fix} (--load {save} begins from its newest one)")


def _listed(steps) -> str:
    numbers = sorted(steps)
    if not numbers:
        return ""
    shown = [str(step) for step in numbers[-4:]]
    return f" (step{'s' if len(numbers) > 1 else ''} {'…, ' if len(numbers) > 4 else ''}{', '.join(shown)})"


def _write_once(path: Path, text: str, tag: str) -> bool:
    """Whether this process made the file: whole or not at all, and never over another's. OSError where it cannot."""
    partial = path.with_name(f".{path.name}.{tag}")
    write_synced(partial, text)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        partial.unlink(missing_ok=True)
    sync(path)
    sync(path.parent)
    return True
