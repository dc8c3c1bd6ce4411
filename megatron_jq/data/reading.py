"""F2: a run's settings → what its sources hold, as token ids once there is a tokenizer."""

from dataclasses import dataclass

from megatron_jq.config import Config
from megatron_jq.data.bad_records import BadRecords, summary_of
from megatron_jq.data.dataset import Source, load_source
from megatron_jq.data.prepared import PreparedSplit, has_split, is_prepared, read_prepared
from megatron_jq.data.prompts import Placed, PromptWriter, encode_pairs, unwritten
from megatron_jq.data.rationale_markers import NO_OPENER
from megatron_jq.data.reasoning_gym import without_size
from megatron_jq.data.template import template_of
from megatron_jq.data.tokenizers import Tokenizer
from megatron_jq.errors import UserError
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.record_error import RecordError
from megatron_jq.formats.sources import is_builtin, is_reasoning_gym


@dataclass(frozen=True)
class Reading:
    """One source that was read: pairs of text, or a prepared split with its ids. label: the flag and its value."""

    label: str
    source: Source | None
    prepared: PreparedSplit | None

    @property
    def data_format(self) -> str:
        """The one that was found in the records, or that a prepared set was made of."""
        return (self.source or self.prepared).data_format

    @property
    def taken(self) -> int:
        """Good examples that were asked for of it."""
        return len(self.source.pairs if self.source is not None else self.prepared.placed)

    @property
    def total(self) -> int:
        """Good examples of the source, of which the first ones may have been asked for."""
        return (self.source or self.prepared).total


@dataclass(frozen=True)
class Encoded:
    """A source's examples, and the records that gave none. total: see Reading. notes: what else is to be said of it."""

    placed: tuple[Placed, ...]
    bad: tuple[RecordError, ...]
    data_format: str
    total: int
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Lines for the user: what was left out, and what was changed."""
        return [line for line in (summary_of(self.bad), *self.notes) if line]


def heldout_source(config: Config) -> str | None:
    """--eval-data; without it, the held-out split that the training data brings: a prepared set's, or a made one."""
    d = config.data
    if d.eval_data is None and is_reasoning_gym(d.train_data):
        return without_size(d.train_data)
    brings_its_own = is_builtin(d.train_data) or has_split(d.train_data, "validation")
    return d.eval_data or (d.train_data if brings_its_own else None)


def read_source(config: Config, source: str, split: str, flag: str, *, count: int | None = None) -> Reading:
    """split: "train", "heldout" or "test". count: how many of it; None and 0 are all. UserError: see load_source and
    read_prepared.
    """
    count = count or None
    d, label = config.data, f"{flag} {source}"
    imitated = split == "train" and config.objective.row.reads_rationales
    if is_prepared(source):
        name = "validation" if split == "heldout" else split
        prepared = read_prepared(source, name, count=count, flag=flag)
        if d.prompt_style not in ("plain", prepared.prompt_style) or d.prompt_template is not None:
            raise UserError(
                f"{label} was prepared with --prompt-style {prepared.prompt_style}; "
                "leave --prompt-style and --prompt-template out, or prepare the set again"
            )
        _check_prompts(label, config, prepared)
        if imitated and any(entry.example.rationale_ids is None for entry in prepared.placed):
            raise UserError(f"{label} was prepared without rationales; prepare it again with --estimator sft")
        return Reading(label, None, prepared)
    options = ReadOptions(
        data_format=d.data_format,
        prompt_field=d.prompt_field,
        answer_field=d.answer_field,
        id_field=d.id_field,
        finqa_answer=d.finqa_answer,
        bad_records=d.bad_records,
        rationale_field=d.rationale_field,
        rationales=imitated,
    )
    seed = config.training.seed
    return Reading(label, load_source(source, options, count=count, seed=seed, split=split, flag=flag), None)


def _check_prompts(label: str, config: Config, prepared: PreparedSplit) -> None:
    """UserError where a setting asks for other prompts than the set holds."""
    d = config.data
    for flag, wanted, default, prepared_with in (
        ("--add-bos-token", d.add_bos_token, "auto", prepared.add_bos_token),
        ("--chat-date", d.chat_date, None, prepared.chat_date),
    ):
        if wanted not in (default, prepared_with):
            was = f"with {flag} {prepared_with}" if prepared_with is not None else f"without {flag}"
            raise UserError(f"{label} was prepared {was}; leave {flag} out, or prepare the set again")


def _check_markers(label: str, prepared: PreparedSplit, tokenizer: Tokenizer) -> None:
    """UserError where a set was prepared for other markers than the tokenizer's."""
    prepared_with = (prepared.think_open, prepared.think_close)
    wanted = (tokenizer.think_open or NO_OPENER, tokenizer.think_close)
    if prepared_with != wanted:
        raise UserError(
            f"{label} was prepared with --think-open {prepared_with[0]} --think-close {prepared_with[1]}, and the run "
            f"has {wanted[0]} and {wanted[1]}; leave both out, or prepare the set again"
        )


def _notes(config: Config, prepared: PreparedSplit, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What to know of a set that is from before --add-bos-token."""
    unlike = prepared.add_bos_token == "off" and config.data.add_bos_token == "auto" and prepared.prompt_style != "warm"
    if not unlike or not tokenizer.bos_ids("auto"):
        return ()
    return (
        "its prompts are without the tokenizer's beginning of a text; with --add-bos-token off all other prompts of "
        "the run, and of its evaluations, are too",
    )


def encode_reading(config: Config, reading: Reading, tokenizer: Tokenizer) -> Encoded:
    """Token ids. UserError: a prepared set of another tokenizer, a template that does not fit, bad records that are
    not to be dropped.
    """
    if reading.prepared is not None:
        if reading.prepared.tokenizer != tokenizer.fingerprint():
            _check_markers(reading.label, reading.prepared, tokenizer)
            path = reading.prepared.tokenizer_path
            raise UserError(
                f"{reading.label} was prepared with another tokenizer; use its own, --tokenizer-model {path}"
            )
        notes = _notes(config, reading.prepared, tokenizer)
        return Encoded(reading.prepared.placed, (), reading.data_format, reading.total, notes)
    d, source = config.data, reading.source
    style = template_of(source.data_format, d.prompt_template).style(d.prompt_style)
    bad = BadRecords(d.bad_records)
    writer = PromptWriter(style, tokenizer, add_bos_token=d.add_bos_token, chat_date=d.chat_date)
    placed = encode_pairs(source.pairs, writer, bad)
    bad.settle(reading.label, len(placed))
    notes = (*source.notes, *writer.notes, *(unwritten(style, tokenizer) if d.prompt_template is not None else ()))
    return Encoded(tuple(placed), (*source.bad, *bad.errors), reading.data_format, reading.total, notes)


def number_of(number: int, total: int) -> str:
    """ "64 of 1,319" where the first of more examples were taken, and "64" where that is all."""
    return f"{number} of {total:,}" if total > number else str(number)
