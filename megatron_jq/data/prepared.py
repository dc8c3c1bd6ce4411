"""F2: a tokenised, validated set on disk, which `--train-data` and `--eval-data` take as they take a file.

manifest.json      what it was made with, and for every split its rows, its file's SHA-256, its fingerprint
train.jsonl        a row an example: where it came from, prompt, answer, aliases, prompt_ids, joint_ids, answer_ids,
                   and rationale_ids where rationales were given
validation.jsonl, test.jsonl
tokenizer.model, or the folder tokenizer/
report.md, lengths.png, dropped.jsonl
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_jq.data.prompts import Placed, fingerprint
from megatron_jq.errors import UserError
from megatron_jq.formats.markers import THINK_CLOSE, THINK_OPEN
from megatron_jq.records import Example

MANIFEST = "manifest.json"
FORMAT = 4
_READABLE = (2, 3, FORMAT)  # 2 had no add_bos_token: no prompt began with one; 2 and 3 no think_open and think_close
SPLITS = ("train", "validation", "test")
_TOKENIZER = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer"}


@dataclass(frozen=True)
class SplitEntry:
    """sha256: of the file. fingerprint: of the examples' ids, as a run's checkpoints keep it."""

    rows: int
    sha256: str
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """content: SHA-256 over the tokenizer's and the splits' fingerprints: equal where training would be the same.
    add_bos_token, chat_date: the settings that the prompts were written with. think_open, think_close: the tokens that
    open (none: nothing does) and close a rationale.
    """

    format: int
    content: str
    data_format: str
    prompt_style: str
    template_sha256: str
    tokenizer_type: str
    tokenizer: str
    splits: dict[str, SplitEntry]
    add_bos_token: str = "off"
    chat_date: str | None = None
    think_open: str = THINK_OPEN
    think_close: str = THINK_CLOSE


@dataclass(frozen=True)
class PreparedSplit:
    """One split that was read and checked. total: its examples, of which `placed` may be the first ones. tokenizer: its
    fingerprint. The rest as in the manifest.
    """

    placed: tuple[Placed, ...]
    total: int
    data_format: str
    prompt_style: str
    tokenizer_type: str
    tokenizer_path: Path
    tokenizer: str
    add_bos_token: str
    chat_date: str | None
    think_open: str
    think_close: str


def is_prepared(source: str) -> bool:
    """Whether a source names a prepared folder, or the file of one of its splits."""
    path = Path(source)
    return (path / MANIFEST).is_file() or (path.name in _files() and (path.parent / MANIFEST).is_file())


def has_split(source: str, split: str) -> bool:
    """Whether a source is a prepared folder with that split."""
    return (Path(source) / MANIFEST).is_file() and (Path(source) / f"{split}.jsonl").is_file()


def write_split(folder: Path, split: str, placed: Sequence[Placed]) -> SplitEntry:
    """The split's file and its entry of the manifest."""
    digest = hashlib.sha256()
    with open(folder / f"{split}.jsonl", "wb") as file:
        for entry in placed:
            example = entry.example
            row = {
                "where": entry.place,
                "prompt": example.prompt_text,
                "answer": example.answer_text,
                "aliases": example.aliases,
                "prompt_ids": example.prompt_ids,
                "joint_ids": example.bridge_ids,
                "answer_ids": example.answer_ids,
                **({} if example.rationale_ids is None else {"rationale_ids": example.rationale_ids}),
            }
            line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
            file.write(line)
            digest.update(line)
    return SplitEntry(len(placed), digest.hexdigest(), fingerprint(entry.example for entry in placed))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def content_hash(tokenizer: str, splits: dict[str, SplitEntry]) -> str:
    lines = [f"tokenizer {tokenizer}", *(f"{name} {splits[name].fingerprint}" for name in sorted(splits))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tokenizer_path(folder: Path, tokenizer_type: str) -> Path:
    return folder / _TOKENIZER[tokenizer_type]


def read_manifest(folder: Path, flag: str) -> Manifest:
    """UserError: not readable, or of another format."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: SplitEntry(**entry) for name, entry in values.pop("splits").items()}
        manifest = Manifest(**values, splits=splits)
        _TOKENIZER[manifest.tokenizer_type]  # a name of ours, not a path
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{flag} {path} is no manifest of a prepared set; prepare it again") from error
    if manifest.format not in _READABLE:
        raise UserError(
            f"{flag} {folder}: its format is {manifest.format}, this version reads {FORMAT}; prepare it again"
        )
    return manifest


def manifest_of(source: str, flag: str) -> Manifest:
    """Of a prepared folder, or of the one that a split's file lies in. UserError: as read_manifest."""
    return read_manifest(_folder(source), flag)


def read_prepared(source: str, split: str, *, count: int | None = None, flag: str = "--train-data") -> PreparedSplit:
    """The first `count` examples (None: all) of a split; a source that names a split's file gives that one.

    UserError: no such split, or a file that is not what the manifest says.
    """
    path, folder = Path(source), _folder(source)
    split = split if folder == path else path.stem
    manifest = read_manifest(folder, flag)
    if split not in manifest.splits:
        raise UserError(f"{flag} {source} has no split {split}; it has {', '.join(manifest.splits)}")
    file, entry = folder / f"{split}.jsonl", manifest.splits[split]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}; prepare the set again") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise UserError(f"{flag} {file} was changed or damaged: its SHA-256 is not the manifest's; prepare it again")
    lines = data.split(b"\n")[:-1]
    placed = tuple(_placed(index, json.loads(line)) for index, line in enumerate(lines[:count]))
    kind = manifest.tokenizer_type
    path = tokenizer_path(folder, kind)
    m = manifest
    return PreparedSplit(
        placed, len(lines), m.data_format, m.prompt_style, kind, path, m.tokenizer, m.add_bos_token, m.chat_date,
        m.think_open, m.think_close,
    )  # fmt: skip


def _folder(source: str) -> Path:
    path = Path(source)
    return path if (path / MANIFEST).is_file() else path.parent


def _placed(index: int, row: dict) -> Placed:
    lists = (tuple(row[name]) for name in ("prompt_ids", "answer_ids", "aliases", "joint_ids"))
    rationale_ids = tuple(row["rationale_ids"]) if "rationale_ids" in row else None
    return Placed(Example(index, row["prompt"], row["answer"], *lists, rationale_ids), row["where"])


def _files() -> set[str]:
    return {f"{split}.jsonl" for split in SPLITS}
