"""F4: whose a folder of checkpoints is. A run resumes, overwrites and removes its own checkpoints alone.

The files that say so: run_files.py. Every manifest holds the run's id too, so that a checkpoint that is copied or moved
is still known.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
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
from megatron_jq.checkpoint.run_files import CLAIM, Claim, Run, read_claim, read_run, write_once
from megatron_jq.errors import UserError
from megatron_jq.files import sync, write_synced

#: Folder beside a run's checkpoints with what --grpo-kl-beta needs: one, with number 0, whatever step the run began at.
REFERENCE = "reference"


def check_save(save: Path, run: Run, *, resume: bool, difference: Callable[[Manifest], str | None]) -> list[str]:
    """Check that `run` may save into the folder, before anything in it is changed. Return lines for the user.

    difference: of a checkpoint that is older than ids, why it is not this run's; None where it is. UserError where the
    folder is another run's, holds another's checkpoints, or is also used by a copy of this run's directory; and for a
    run that does not resume, where it holds any.
    """
    claim = read_claim(save)
    if claim is not None and claim.id != run.id and not _is_stale(claim, save):
        raise _taken(save, f"belongs to {claim.run}{_listed(saved_steps(save))}", claim.run)
    claimed = claim is not None and claim.id == run.id
    if claim is not None and claimed:
        _refuse_copy(claim, save, run)
    run_steps, notes = _steps_of_run(save, run, difference, notes_wanted=not claimed)
    if saved_steps(save) and not resume:
        whose = f"of {run} already" if run_steps else "that cannot be read"
        raise UserError(
            f"--save {save} holds checkpoints {whose}{_listed(saved_steps(save))}; give --resume to continue their "
            "run, name another folder, or remove them"
        )
    inside = Path(run.directory) in save.resolve().parents
    unknown = [path.name for path in leftovers(save)] + [
        path.name for step, path in saved_steps(save).items() if step not in run_steps
    ]
    if unknown and not (claimed or inside or run_steps):
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
        if not write_once(save / CLAIM, text, tag=run.id):
            other = read_claim(save)
            run_there = None if other is None else other.run
            raise _taken(save, f"was claimed by {run_there or 'another run'} a moment ago", run_there)
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
    except UserError as error:  # the ranks that write a checkpoint handle no other error
        raise OSError(0, str(error)) from error
    if claim is not None and claim.id != manifest.run["id"]:
        raise OSError(0, f"the folder belongs to {claim.run} now")
    present = readable_manifest(final) if final.exists() else None
    if present is not None and present.run is not None and present.run["id"] != manifest.run["id"]:
        raise OSError(0, f"{final.name} there is of {Run(**present.run)}")


def _steps_of_run(
    save: Path, run: Run, difference: Callable[[Manifest], str | None], *, notes_wanted: bool
) -> tuple[list[int], list[str]]:
    """Steps of the run's own checkpoints, and notes. UserError for the first one of another run. What cannot be read is
    neither.
    """
    steps: list[int] = []
    older: list[str] = []
    folders: list[tuple[int | None, Path]] = [*saved_steps(save).items()]
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
            steps.append(step)
    notes = []
    if older and notes_wanted:
        notes = [
            f"{', '.join(sorted(older))} in {save}: older than runs' ids; taken for this run's, since its settings are "
            "the same, and its data is compared when it is loaded"
        ]
    return steps, notes


def _is_stale(claim: Claim, save: Path) -> bool:
    """Whether a claim is without a run: its directory is gone, and it saved nothing."""
    there = read_run(Path(claim.directory))
    return (there is None or there.id != claim.id) and not saved_steps(save) and not leftovers(save)


def _refuse_copy(claim: Claim, save: Path, run: Run) -> None:
    """Refuse a copy. A run directory may move, and so may its checkpoints; two directories may not share them."""
    if claim.directory == run.directory or claim.save != str(save.resolve()):
        return
    there = read_run(Path(claim.directory))
    if there is not None and there.id == run.id and not os.path.samefile(claim.directory, run.directory):
        raise UserError(
            f"--save {save} belongs to {claim.run}, and --run-dir {run.directory} is a copy of that: two runs would "
            f"mix; give the copy a --save of its own (a copy of the folder will do), or remove the other directory"
        )


def _taken(save: Path, what: str, other: Run | None) -> UserError:
    fix = "give this run a --save of its own"
    if other is not None and Path(other.directory).is_dir():
        fix += f", or continue that one with --run-dir {other.directory} --resume"
    elif other is not None:
        fix = (
            f"its run directory {other.directory} is gone; to continue from these checkpoints, give --load {save}, and"
        )
        fix += " a new --run-dir and --save"
        return UserError(f"--save {save} {what}: {fix} (docs/checkpoints.md, by hand)")
    return UserError(f"--save {save} {what}: it is not this run's; {fix} (--load {save} begins from its newest one)")


def _listed(steps: Iterable[int]) -> str:
    numbers = sorted(steps)
    if not numbers:
        return ""
    shown = [str(step) for step in numbers[-4:]]
    return f" (step{'s' if len(numbers) > 1 else ''} {'…, ' if len(numbers) > 4 else ''}{', '.join(shown)})"
