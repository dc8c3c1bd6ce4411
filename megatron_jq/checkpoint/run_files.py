"""F4: the small files by which runs know each other's folders: a run's id, its claim on a folder, a lock.

    RUN_DIR/run_id     the run's id, made once
    SAVE/run.json      the id and the directory of the run that saves here, and where SAVE was then
    SAVE/.lock         locked by the process that trains (RUN_DIR/.lock likewise)

A lock keeps out a second process of the same run, and ends with its process; a claim keeps out other runs, also while
nobody trains. ownership.py has the rules that read them.
"""

import errno
import fcntl
import json
import os
import re
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.errors import UserError
from megatron_jq.files import reason, sync, write_synced

RUN_ID, CLAIM, LOCK = "run_id", "run.json", ".lock"


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
            raise UserError(f"{flag} {folder} is in use by {other}; {_way_out(other, holder)}") from error
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}, {holder}\n".encode())

    def release(self) -> None:
        os.close(self._file)


def own_run(run_dir: Path) -> Run:
    """Return the run of a directory, which gets an id where it has none. UserError where its file holds none."""
    run = read_run(run_dir)
    if run is None:
        write_once(run_dir / RUN_ID, f"{uuid.uuid4().hex}\n", tag=str(os.getpid()))
        run = read_run(run_dir)
        assert run is not None
    return run


def read_run(run_dir: Path) -> Run | None:
    """Return the run of a directory; None where it has none. UserError where its file holds no id."""
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
    """Return the claim on a folder; None where nobody has claimed it. UserError where the claim cannot be read."""
    path = save / CLAIM
    try:
        return Claim(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--save {path} cannot be read: {error}; remove it if no run that is to continue saves here"
        ) from error


def _way_out(other: str, holder: str) -> str:
    """What to do about a folder that another process holds. holder: this process's words for itself."""
    if other.endswith(holder):
        return "wait until that has ended, or name another folder"
    return "that is another run: name another folder"


def write_once(path: Path, text: str, tag: str) -> bool:
    """Return whether this process made the file: whole or not at all, never over another's. OSError where it cannot."""
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
