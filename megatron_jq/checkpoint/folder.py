"""F4: checkpoint folders: names, the manifest, checksums, atomic appearance, and finding the newest whole one.

    SAVE/latest_checkpointed_iteration.txt   "40": written last, by rename
    SAVE/iter_0000040/checkpoint.json        the manifest: what it is and every other file's size and SHA-256
    SAVE/iter_0000040/.metadata, *.distcp    tensors (torch_dist.py)
    SAVE/.iter_0000060.partial/              one that is being written, or whose writer was killed

A folder gets its name when it is whole, so a reader never meets half of one; checksums are for what happens later.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_jq import __version__
from megatron_jq.checkpoint import contents
from megatron_jq.checkpoint.contents import DamagedCheckpoint, checksums, file_names, verify
from megatron_jq.checkpoint.lineage import descends, latest, same_run
from megatron_jq.errors import UserError
from megatron_jq.files import reason, sync, write_synced
from megatron_jq.parallel.megatron.versions import find_version

TRACKER, MANIFEST, TOKENIZER = "latest_checkpointed_iteration.txt", contents.MANIFEST, contents.TOKENIZER
_FORMAT = 1
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json. What a field says of a run is None in a checkpoint that no run wrote (a conversion)."""

    step: int  # optimizer steps done
    architecture: dict[str, Any]  # Architecture's fields
    vocab_size: int  # true size
    bf16: bool
    config: str | None = None  # the resolved settings, as config.toml
    layout: dict[str, int] | None = None  # parallel sizes of the run that wrote it
    optimizer: dict[str, Any] | None = None  # None: weights alone
    metrics: dict[str, float | None] | None = None  # of the last step
    metrics_bytes: int | None = None  # length of metrics.jsonl after that step
    data: str | None = None  # fingerprint of the tokenised training set
    tokenizer: str | None = None  # its fingerprint
    answer_budget: int | None = None  # tokens that a sampled answer may take
    run: dict[str, str] | None = None  # "id" and "directory" (ownership.py); None: no run, or one older than ids
    branches: list[list] | None = None  # lineage.py
    written: float | None = None  # seconds since 1970
    versions: dict[str, str] | None = None  # packages that wrote it
    source: dict[str, Any] | None = None  # of a conversion: what it was made from
    by_time: bool = False  # saved because --save-interval-minutes had passed, and for no other reason
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → bytes, sha256
    format: int = _FORMAT


def package_versions(*others: str) -> dict[str, str]:
    """For a manifest: of this package, which may run from its sources, of the engine, and of `others`."""
    engine = {"megatron-jq": __version__, "megatron-core": find_version() or "unknown"}
    return {**engine, **{name: version(name) for name in ("torch", *others)}}


def folder_name(step: int) -> str:
    """As Megatron names them."""
    return f"iter_{step:07d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None where it is none."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else None


def begin(save: Path, step: int) -> Path:
    """Make an empty folder to write checkpoint `step` into. OSError where that cannot be made."""
    save.mkdir(parents=True, exist_ok=True)
    partial = save / f".{folder_name(step)}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def commit(partial: Path, manifest: Manifest, files: Mapping[str, dict[str, Any]] | None = None) -> Path:
    """Give a folder that is written its name. files: checksums that are known already; the others are computed here.

    Order: data on disk, manifest, rename, tracker. Another checkpoint of the same step makes way only then.
    """
    known = dict(files or {})
    rest = [name for name in file_names(partial) if name not in known]
    for name in rest:
        sync(partial / name)
    manifest = replace(manifest, files={**known, **checksums(partial, rest)})
    write_synced(partial / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    for folder in {partial, *(path.parent for path in partial.rglob("*"))}:
        sync(folder)
    final, old = partial.parent / folder_name(manifest.step), partial.parent / f".{folder_name(manifest.step)}.old"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    write_synced(final.parent / f".{TRACKER}", f"{manifest.step}\n")
    (final.parent / f".{TRACKER}").replace(final.parent / TRACKER)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest. DamagedCheckpoint where none can be read; UserError for a later version's."""
    path = folder / MANIFEST
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        later = table["format"] > _FORMAT
        known = {f.name for f in fields(Manifest)}
        manifest = None if later else Manifest(**{key: value for key, value in table.items() if key in known})
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} is not a manifest: {error}") from error
    if manifest is None:
        raise UserError(f"{path} was written by a later version of megatron-jq; update the package")
    return manifest


def candidates(load: Path, flag: str = "--load") -> list[Path]:
    """Return checkpoint folders to try, best first: `load` itself where it is one; else the one that the tracker
    names, then those that it descends from, newest first. Without a tracker, from the one that was written last. Empty
    where a folder holds none.

    UserError where `load` is no folder, or the tracker names no checkpoint in it.
    """
    if not load.is_dir():
        raise UserError(f"{flag} {load}: there is no such folder")
    if step_of(load) is not None or (load / MANIFEST).exists():
        return [load]
    steps = saved_steps(load)
    tracked = read_tracker(load, flag)
    if not steps:
        return []
    if tracked is not None:
        steps = {step: path for step, path in steps.items() if step <= tracked}
    manifests = {step: manifest for step, path in steps.items() if (manifest := readable_manifest(path)) is not None}
    newest = manifests.get(tracked) if tracked is not None else None
    if newest is None and manifests:
        newest = latest(manifests.values())
    # What cannot be read is named by whoever verifies it.
    return [
        path
        for step, path in steps.items()
        if newest is None or step not in manifests or descends(newest, manifests[step])
    ]


def saved_steps(save: Path) -> dict[int, Path]:
    """Step → folder of each checkpoint, newest first."""
    steps = {step: path for path in save.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    return dict(sorted(steps.items(), reverse=True))


def read_tracker(load: Path, flag: str) -> int | None:
    """Return the step that the tracker names; None where there is no tracker.

    UserError where it does not name a checkpoint of the folder: a run must not continue from another step than somebody
    wrote there. Only a writer that was killed as it replaced that checkpoint leaves a number without a folder.
    """
    path, steps = load / TRACKER, sorted(saved_steps(load))
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError:
        text = "bytes that are no text"
    known = f"there are {', '.join(map(str, steps))}" if steps else "the folder holds none"
    fix = "write one of these into it, or remove it to take the newest" if steps else "remove it, or restore them"
    if re.fullmatch(r"[0-9]{1,18}", text) is None:
        says = f"says {text[:40]!r}" if text else "is empty"
        raise UserError(f"{flag} {path} {says}, which is no checkpoint's step ({known}); {fix}")
    step = int(text)
    replaced = any((load / f".{folder_name(step)}.{end}").exists() for end in ("partial", "old"))
    if step not in steps and not replaced:
        raise UserError(f"{flag} {path} names step {step}, which is not there ({known}); {fix}")
    return step


def readable_manifest(folder: Path) -> Manifest | None:
    """None where a folder holds no manifest that this version can read."""
    try:
        return read_manifest(folder)
    except UserError:
        return None


def find(load: Path, flag: str = "--load", log: Callable[[str], None] = print) -> Path:
    """Return the newest whole checkpoint in (or at) `load`, every file verified by this process.

    Damaged ones are logged and skipped. UserError where there is none.
    """
    damage = []
    for folder in candidates(load, flag):
        try:
            manifest = read_manifest(folder)
            verify(folder, manifest, manifest.files)
            return folder
        except DamagedCheckpoint as error:
            damage.append(str(error))
            log(f"warning: checkpoint {folder.name} is damaged and skipped: {error}")
    raise none_found(load, damage, flag)


def left_aside(load: Path, flag: str = "--load") -> list[int]:
    """Steps of checkpoints in a folder that its newest one does not descend from: no run continues from them."""
    return sorted(set(saved_steps(load)) - {step_of(path) for path in candidates(load, flag)})


def none_found(load: Path, damage: list[str], flag: str) -> UserError:
    """Return what to raise where no candidate was whole."""
    if damage:
        aside = [] if step_of(load) is not None else left_aside(load, flag)
        hint = f"; to continue from step {' or '.join(map(str, aside))}, write that into {TRACKER}" if aside else ""
        return UserError(f"{flag} {load}: no whole checkpoint; {'; '.join(damage)}{hint}")
    hint = ""
    if (load / "checkpoints").is_dir():
        hint = f"; a run's lie in {load / 'checkpoints'}"
    elif (load / "config.json").is_file():
        hint = "; it is a Hugging Face folder: evaluate and convert take it with --hf, train with --model"
    return UserError(f"{flag} {load}: there is no checkpoint (iter_NNNNNNN) in this folder{hint}")


def prune(save: Path, *, keep_last: int | None, keep_best: str | None, newest: Manifest | None = None) -> list[Path]:
    """Remove the run's checkpoints that are no longer kept; returns the removed. newest: what was saved last; None:
    what the tracker names.

    Kept are the newest keep_last (None: all), not counting those that were saved for the time alone; of these, the ones
    among the newest two of all checkpoints (with keep_last 1: the newest); and, of those that `newest` descends from,
    the one with the highest metric keep_best. What lies on a branch that the run left counts as older than all that it
    continued from. Checkpoints of another run, and those whose manifest cannot be read, are not touched.

    A folder is renamed before it is emptied, so that what is left of a removal that was cut short has no name.
    """
    remove_partial(save)
    manifests = {path: m for path in saved_steps(save).values() if (m := readable_manifest(path)) is not None}
    if newest is None:
        tracked = read_tracker(save, "--save")
        newest = next((m for m in manifests.values() if m.step == tracked), None)
    if newest is None:
        return []
    run = {path: m for path, m in manifests.items() if same_run(m, newest)}
    line = [path for path, m in run.items() if descends(newest, m)]
    newest_first = [*line, *(path for path in run if path not in line)]
    planned = [path for path in newest_first if not run[path].by_time]
    stays = {*planned[:keep_last], *newest_first[: min(2, keep_last or 2)]}
    if keep_best is not None:
        values = {path: value for path in line if (value := (run[path].metrics or {}).get(keep_best)) is not None}
        stays |= {max(values, key=values.__getitem__)} if values else set()
    removed = sorted(path for path in run if path not in stays)
    for path in removed:
        shutil.rmtree(path.rename(path.parent / f".{path.name}.old"), ignore_errors=True)
    return removed


def remove_partial(save: Path) -> None:
    """Remove what writers and removals that were killed have left. Only where no writer is at work."""
    for path in leftovers(save):
        shutil.rmtree(path, ignore_errors=True)


def leftovers(save: Path) -> list[Path]:
    """Checkpoints that are being written or removed, or whose writer was killed."""
    return [*save.glob(".iter_*.partial"), *save.glob(".iter_*.old")]
