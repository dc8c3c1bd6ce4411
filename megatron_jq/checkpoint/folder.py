"""F4: checkpoint folders: names, the manifest, checksums, atomic appearance, and finding the newest whole one.

    SAVE/latest_checkpointed_iteration.txt   "40": written last, by rename
    SAVE/iter_0000040/checkpoint.json        the manifest: what it is and every other file's size and SHA-256
    SAVE/iter_0000040/.metadata, *.distcp    tensors (torch_dist.py)
    SAVE/.iter_0000060.partial/              one that is being written, or whose writer was killed

A folder gets its name when it is whole, so a reader never meets half of one; checksums are for what happens later.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_jq import __version__
from megatron_jq.errors import UserError
from megatron_jq.files import inside, sync, write_synced

TRACKER, MANIFEST, TOKENIZER = "latest_checkpointed_iteration.txt", "checkpoint.json", "tokenizer"
#: What a tokenizer's folder may hold: the rest of such a folder (often a whole model) is not carried along.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
)  # fmt: skip
_FORMAT = 1
_ITERATION = re.compile(r"iter_(\d{7,})")


class DamagedCheckpoint(UserError):
    """A folder does not hold what it promises; the text names the file or the tensor."""


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
    metrics_bytes: int | None = None  # length of metrics.jsonl behind that step
    data: str | None = None  # fingerprint of the tokenised training set
    versions: dict[str, str] | None = None  # packages that wrote it
    source: dict[str, Any] | None = None  # of a conversion: what it was made from
    by_time: bool = False  # saved because --save-interval-minutes had passed, and for no other reason
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → bytes, sha256
    format: int = _FORMAT


def package_versions(*others: str) -> dict[str, str]:
    """For a manifest: of this package, which may run from its sources, of the engine, and of `others`."""
    return {"megatron-jq": __version__, **{name: version(name) for name in ("megatron-core", "torch", *others)}}


def folder_name(step: int) -> str:
    """As Megatron names them."""
    return f"iter_{step:07d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None where it is none."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else None


def begin(save: Path, step: int) -> Path:
    """An empty folder to write checkpoint `step` into. OSError where that cannot be made."""
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
    rest = [name for name in _names(partial) if name not in known]
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


def carry_tokenizer(source: Path, partial: Path) -> None:
    """Copy a tokenizer's file, or those of its folder that are a tokenizer's, into a checkpoint that is written."""
    target = partial / TOKENIZER
    target.mkdir(exist_ok=True)
    for path in [source] if source.is_file() else [source / name for name in TOKENIZER_FILES]:
        if path.is_file():
            shutil.copyfile(path, target / ("tokenizer.model" if path == source else path.name))


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """name → {"bytes", "sha256"} of files in a folder."""
    found = {}
    for name in names:
        with open(inside(folder, name, folder / MANIFEST, DamagedCheckpoint), "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
            found[name] = {"bytes": file.tell(), "sha256": digest.hexdigest()}
    return found


def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """DamagedCheckpoint for the first of these files that is not what was written."""
    for name in names:
        promised, path = manifest.files[name], inside(folder, name, folder / MANIFEST, DamagedCheckpoint)
        try:
            size = path.stat().st_size
            if size != promised["bytes"]:
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {promised['bytes']}")
            if checksums(folder, [name])[name]["sha256"] != promised["sha256"]:
                raise DamagedCheckpoint(f"{path} does not match its checksum")
        except FileNotFoundError as fault:
            raise DamagedCheckpoint(f"{path} is missing") from fault
        except OSError as fault:
            raise DamagedCheckpoint(f"{path} cannot be read: {fault.strerror}") from fault


def read_manifest(folder: Path) -> Manifest:
    """DamagedCheckpoint where there is none that can be read; UserError where a later version wrote it."""
    path = folder / MANIFEST
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        later = table["format"] > _FORMAT
        known = {f.name for f in fields(Manifest)}
        manifest = None if later else Manifest(**{key: value for key, value in table.items() if key in known})
    except OSError as fault:
        raise DamagedCheckpoint(f"{path} cannot be read: {fault.strerror}") from fault
    except (ValueError, TypeError, KeyError) as fault:
        raise DamagedCheckpoint(f"{path} is not a manifest: {fault}") from fault
    if manifest is None:
        raise UserError(f"{path} was written by a later version of megatron-jq; update the package")
    return manifest


def candidates(load: Path, flag: str = "--load") -> list[Path]:
    """Checkpoint folders to try, best first: `load` itself where it is one; else those in it, from the one that the
    tracker names downwards, and behind these any later ones. Empty where a folder holds none.

    UserError where `load` is no folder.
    """
    if not load.is_dir():
        raise UserError(f"{flag} {load}: there is no such folder")
    if step_of(load) is not None or (load / MANIFEST).exists():
        return [load]
    steps = sorted(((step_of(path), path) for path in load.iterdir() if step_of(path) is not None), reverse=True)
    try:
        named = int((load / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        named = steps[0][0] if steps else 0
    return [path for step, path in steps if step <= named] + [path for step, path in steps if step > named]


def find(load: Path, flag: str = "--load", say: Callable[[str], None] = print) -> Path:
    """The newest whole checkpoint in (or at) `load`, every file verified by this process; damaged ones are said and
    skipped. UserError where there is none.
    """
    damage = []
    for folder in candidates(load, flag):
        try:
            manifest = read_manifest(folder)
            verify(folder, manifest, manifest.files)
            return folder
        except DamagedCheckpoint as fault:
            damage.append(str(fault))
            say(f"warning: checkpoint {folder.name} is damaged and skipped: {fault}")
    raise none_found(load, damage, flag)


def none_found(load: Path, damage: list[str], flag: str) -> UserError:
    """What to raise where no candidate was whole."""
    if damage:
        return UserError(f"{flag} {load}: no whole checkpoint; {'; '.join(damage)}")
    return UserError(f"{flag} {load}: there is no checkpoint (iter_NNNNNNN) in this folder")


def prune(save: Path, *, keep_last: int | None, keep_best: str | None) -> list[Path]:
    """Remove checkpoints that are no longer kept; returns the removed.

    Kept are the newest keep_last (None: all), not counting those that were saved for the time alone; of these, the ones
    among the newest two of all checkpoints (with keep_last 1: the newest); and the one with the highest metric
    keep_best. A folder is renamed before it is emptied, so that what is left of a removal that was cut short has no
    name.
    """
    remove_partial(save)
    paths = [path for _, path in sorted((step_of(p), p) for p in save.iterdir() if step_of(p) is not None)]
    manifests = {path: _manifest_or_none(path) for path in paths}
    by_time = [path for path in paths if manifests[path] is not None and manifests[path].by_time]
    planned = [path for path in paths if path not in by_time]
    stays = {*planned[-keep_last if keep_last else 0 :], *paths[-min(2, keep_last or 2) :]}
    if keep_best is not None:
        values = {path: m.metrics.get(keep_best) for path, m in manifests.items() if m is not None and m.metrics}
        known = [path for path, value in values.items() if value is not None]
        stays |= {max(known, key=values.__getitem__)} if known else set()
    removed = [path for path in paths if path not in stays]
    for path in removed:
        shutil.rmtree(path.rename(path.parent / f".{path.name}.old"), ignore_errors=True)
    return removed


def remove_partial(save: Path) -> None:
    """Remove what writers and removals that were killed left behind. Only where no writer is at work."""
    for path in [*save.glob(".iter_*.partial"), *save.glob(".iter_*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def _manifest_or_none(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except UserError:
        return None


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(file) -> "hashlib._Hash":
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
