"""F2: data sources → one prepared set on disk, with a report. One process; the same input gives the same bytes."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_jq.config import Config
from megatron_jq.data.dataset import train_tokenizer
from megatron_jq.data.lengths import Budgets, Lengths, plot_lengths
from megatron_jq.data.prepare_report import UsableExamples, report
from megatron_jq.data.prepared import (
    FORMAT,
    SPLITS,
    Manifest,
    content_hash,
    tokenizer_path,
    write_manifest,
    write_split,
)
from megatron_jq.data.prompts import Placed, longest_bridge, select_fitting
from megatron_jq.data.rationale_markers import NO_OPENER
from megatron_jq.data.reading import Reading, encode_reading, heldout_source, read_source
from megatron_jq.data.round_trips import describe_changed
from megatron_jq.data.splits import cut, parse_sizes, shared_prompts
from megatron_jq.data.template import PromptTemplate, template_of
from megatron_jq.data.tokenizer_choice import marker_choice, resolved
from megatron_jq.data.tokenizers import Tokenizer, load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.files import sync
from megatron_jq.formats.record_error import RecordError
from megatron_jq.formats.sources import is_builtin

_READ_AS = {"train": "train", "validation": "heldout", "test": "test"}


@dataclass(frozen=True)
class Prepared:
    """What was written. report: its text, Markdown."""

    folder: Path
    content: str
    report: str


def prepare(
    config: Config, output: Path, *, test_data: str | None, split_sizes: str | None, context: int | None
) -> Prepared:
    """Read --train-data, --eval-data (validation) and test_data, tokenise, drop or refuse, split, write, report.

    split_sizes: "paper", or "train=N,validation=N,test=rest"; a split without a source of its own is cut from the
    source before it. None: every source is one split, whole. context: the model's, for the report. The folder appears
    whole or not at all. UserError: bad input, `output` exists, fewer examples than asked for.
    """
    if output.exists():
        raise UserError(f"--output {output} exists; name a new folder, or remove it")
    config = replace(config, data=resolved(config.data))
    sources = _sources(config, test_data)
    readings = {split: _read(config, split, source, flag) for split, (flag, source) in sources.items()}
    template = template_of(readings["train"].source.data_format, config.data.prompt_template)
    sizes = _sizes(split_sizes, template, readings)
    groups = _groups(sizes, readings)
    budgets = _budgets(config, template, context)
    with _whole_or_nothing(output) as partial:
        tokenizer = _tokenizer(config, readings["train"], partial)
        usable = {split: _usable(config, readings[split], tokenizer, budgets) for split in readings}
        splits = cut({names: usable[split].placed for split, names in groups.items()}, sizes, config.training.seed)
        manifest = _write(config, partial, template, readings["train"], tokenizer, splits)
        lengths = [_lengths(name, placed) for name, placed in splits.items()]
        too_long = _lengths("left out: too long", [entry for source in usable.values() for entry in source.too_long])
        plot_lengths(lengths, too_long, budgets, partial / "lengths.png")
        text = report(config, manifest, template, budgets, list(usable.values()), lengths, shared_prompts(splits))
        (partial / "report.md").write_text(text, encoding="utf-8")
        _write_dropped(partial / "dropped.jsonl", [error for source in usable.values() for error in source.dropped])
    return Prepared(output, manifest.content, text)


@contextlib.contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to fill, which stands at `output` once all of it is on disk, and nowhere if something fails."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            partial = Path(scratch) / "set"
            partial.mkdir()
            yield partial
            for path in [*sorted(partial.rglob("*")), partial]:
                sync(path)
            os.rename(partial, output)
            sync(output.parent)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name another folder") from error


def _sources(config: Config, test_data: str | None) -> dict[str, tuple[str, str]]:
    """Split → its flag and source. Sources that make their examples bring a validation split."""
    d = config.data
    if config.objective.row.pretrains:
        raise UserError(
            f"--estimator {config.objective.estimator} reads --data-path, which tools/preprocess_data.py writes; leave "
            "it out"
        )
    sources = {"train": ("--train-data", d.train_data)}
    validation = heldout_source(config)
    if validation is not None:
        sources["validation"] = ("--eval-data", validation)
    if test_data is not None:
        sources["test"] = ("--test-data", test_data)
    return sources


def _read(config: Config, split: str, source: str, flag: str) -> Reading:
    d, count = config.data, None
    if is_builtin(source):
        if split == "test":
            raise UserError(f"{flag} {source}: built-in tasks have no third split; give a file")
        count = d.train_examples if split == "train" else d.eval_examples
    reading = read_source(config, source, _READ_AS[split], flag, count=count)
    if reading.prepared is not None:
        raise UserError(f"{reading.label} is a prepared set already; give the files it was made of")
    return reading


def _sizes(text: str | None, template: PromptTemplate, readings: dict[str, Reading]) -> dict[str, int | None]:
    if text is None:
        return dict.fromkeys(readings)
    if text != "paper":
        sizes = parse_sizes(text)
    elif template.paper is None:
        raise UserError("--split-sizes paper: the paper has none for this data; give train=N,validation=N,test=N")
    else:
        sizes = template.paper.split_sizes
    if "train" not in sizes:
        raise UserError(f"--split-sizes {text} lacks train; a set without it trains nothing")
    if unused := [split for split in readings if split not in sizes]:
        raise UserError(f"--split-sizes {text} lacks {', '.join(unused)}, for which data is given; add it")
    return sizes


def _groups(sizes: dict[str, int | None], readings: dict[str, Reading]) -> dict[str, tuple[str, ...]]:
    """The split that a source was given for → the splits that are cut from it."""
    groups: dict[str, tuple[str, ...]] = {}
    owner = "train"
    for split in (name for name in SPLITS if name in sizes):
        owner = split if split in readings else owner
        groups[owner] = (*groups.get(owner, ()), split)
    return groups


def _budgets(config: Config, template: PromptTemplate, context: int | None) -> Budgets:
    """What the settings say; where they say nothing, the paper's numbers for the data set."""
    r, paper = config.rollout, template.paper
    untouched = r.rationale_budget == type(r)().rationale_budget
    return Budgets(
        config.data.max_prompt_tokens,
        paper.rationale_budget if paper and untouched else r.rationale_budget,
        paper.answer_budget if paper and r.answer_budget is None else r.answer_budget,
        context,
    )


def _tokenizer(config: Config, train: Reading, folder: Path) -> Tokenizer:
    """--tokenizer-model copied into the folder, or one trained on the training source's text there."""
    d = config.data
    path = tokenizer_path(folder, d.tokenizer_type)
    if d.tokenizer_model is None:
        if d.tokenizer_type != "sentencepiece":
            raise UserError(f"--tokenizer-type {d.tokenizer_type} needs --tokenizer-model")
        train_tokenizer(d.train_data, train.source.pairs, path, vocab_size=d.tokenizer_vocab_size)
        return load_tokenizer(d.tokenizer_type, path, marker_choice(config))
    tokenizer = load_tokenizer(d.tokenizer_type, d.tokenizer_model, marker_choice(config))
    tokenizer.save(path)
    return tokenizer


def _usable(config: Config, reading: Reading, tokenizer: Tokenizer, budgets: Budgets) -> UsableExamples:
    encoded = encode_reading(config, reading, tokenizer)
    fitting = select_fitting(
        encoded.placed,
        max_prompt_tokens=budgets.max_prompt_tokens,
        answer_budget=budgets.answer_budget,
        rationale_budget=budgets.rationale_budget if config.objective.row.reads_rationales else None,
        overlong=config.data.overlong_prompts,
    )
    placed, fitting_places = tuple(map(Placed, fitting.examples, fitting.places)), set(fitting.places)
    too_long = tuple(entry for entry in encoded.placed if entry.place not in fitting_places)
    dropped = (*encoded.bad, *fitting.misfits)
    changed = describe_changed(placed, tokenizer)
    lengths = _lengths(reading.label, encoded.placed)
    return UsableExamples(reading.label, lengths, placed, too_long, dropped, encoded.notes, changed)


def _lengths(name: str, placed: Sequence[Placed]) -> Lengths:
    examples = [entry.example for entry in placed]
    prompts, answers = [len(e.prompt_ids) for e in examples], [len(e.answer_ids) for e in examples]
    return Lengths(name, tuple(prompts), tuple(answers), longest_bridge(placed))


def _write(config, folder: Path, template: PromptTemplate, train: Reading, tokenizer: Tokenizer, splits) -> Manifest:
    d = config.data
    entries = {name: write_split(folder, name, placed) for name, placed in splits.items()}
    manifest = Manifest(
        format=FORMAT,
        content=content_hash(tokenizer.fingerprint(), entries),
        data_format=train.source.data_format,
        prompt_style=d.prompt_style,
        template_sha256=template.digest,
        tokenizer_type=d.tokenizer_type,
        tokenizer=tokenizer.fingerprint(),
        splits=entries,
        add_bos_token=d.add_bos_token,
        chat_date=d.chat_date,
        think_open=tokenizer.think_open or NO_OPENER,
        think_close=tokenizer.think_close,
    )
    write_manifest(folder, manifest)
    return manifest


def _write_dropped(path: Path, dropped: Sequence[RecordError]) -> None:
    rows = ({"where": error.place, "kind": error.kind, "detail": error.detail} for error in dropped)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
