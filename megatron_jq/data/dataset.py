"""F2: from the name of a data source to its pairs, and to a tokenizer trained on them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_jq.data.bad_records import BadRecords
from megatron_jq.data.containers import other_shards
from megatron_jq.data.converting import Converter
from megatron_jq.data.hub import is_hub, read_hub
from megatron_jq.data.jsonl import Record, read_records
from megatron_jq.data.reasoning_gym import read_reasoning_gym
from megatron_jq.data.tasks import builtin_examples, builtin_texts
from megatron_jq.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.formats.finqa import FINQA_ANSWERS
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError
from megatron_jq.formats.row import DataFormat
from megatron_jq.formats.sources import BUILTIN_PREFIX, is_builtin, is_made, is_reasoning_gym
from megatron_jq.formats.table import FORMATS, format_named, recognise
from megatron_jq.toml_files import did_you_mean

#: What others import from here, how records are read included.
__all__ = ["ReadOptions", "Source", "load_source", "train_tokenizer"]

DEFAULT_BUILTIN_COUNT = {"train": 1024, "heldout": 128}
DEFAULT_VOCAB_SIZE = 1024
HUB_SPLITS = {"train": "train", "heldout": "validation", "test": "test"}


@dataclass(frozen=True)
class Source:
    """What a data source gave. data_format: a row's name, or one of formats.table.MADE. total: good pairs of
    the source, of which `pairs` may be the first ones. notes: what else is to be said of it.
    """

    pairs: tuple[Pair, ...]
    data_format: str
    total: int
    bad: tuple[RecordError, ...] = ()
    notes: tuple[str, ...] = ()


def load_source(
    source: str,
    options: ReadOptions,
    *,
    count: int | None = None,
    seed: int = 0,
    split: str = "train",
    flag: str = "--train-data",
) -> Source:
    """The pairs of "builtin:KIND", "reasoning-gym:NAME…", "hub:NAME…", or of a file of JSON records or parquet rows.

    A built-in kind gives `count` examples of the split, drawn from the seed (None: 1024 to train, 128 held out). A set
    of reasoning-gym names its seed and size itself, and gives its split's first `count` items. A file
    is one split, whatever `split` says, and gives its first `count` pairs in order (None: all). `flag` is the option
    that named the source. data_format "auto" takes a file for a known data set's when its first good record has that
    form and no other prompt field was asked for. UserError: an unknown option, a source that cannot be read; bad
    records, unless options.bad_records says to drop them.
    """
    _check(options, source, count, flag)
    if is_made(source) and options.rationales:
        maker = "built-in tasks" if is_builtin(source) else "sets of reasoning-gym"
        raise UserError(f"{flag} {source}: {maker} give no rationales, and --estimator sft needs them")
    if is_reasoning_gym(source):
        items = read_reasoning_gym(source, split, flag=flag)
        return Source(items.pairs[:count], items.data_format, len(items.pairs), notes=items.notes)
    if is_builtin(source):
        kind = source.removeprefix(BUILTIN_PREFIX)
        drawn = builtin_examples(kind, split, count or DEFAULT_BUILTIN_COUNT.get(split, 1), seed)
        pairs = tuple(Pair(prompt, answer, f"{source}[{row}]") for row, (prompt, answer) in enumerate(drawn))
        return Source(pairs, "builtin", len(pairs))
    records = read_hub(source, HUB_SPLITS[split], flag=flag) if is_hub(source) else read_records(source, flag=flag)
    data_format, records = _detected(options, records)
    bad = BadRecords(options.bad_records)
    convert = Converter(data_format, options)
    pairs = bad.sieve(records, convert)
    bad.settle(f"{flag} {source}", len(pairs))
    shards = "" if is_hub(source) else other_shards(source)
    notes = (*convert.notes, *([shards] if shards else []))
    return Source(tuple(pairs[:count]), data_format.name, len(pairs), tuple(bad.errors), notes)


def train_tokenizer(
    source: str, pairs: Sequence[Pair], path: str | Path, *, vocab_size: int | None = None
) -> SentencePieceTokenizer:
    """A sentencepiece model for the source, written to `path`.

    With no vocab_size, a built-in kind gets one piece a word and no byte pieces (some 60 in all), so that its answers
    are as many tokens as words; a file gets BPE of 1024 pieces on its prompts and answers. A vocab_size asks for BPE of
    that size either way.
    """
    if is_builtin(source) and vocab_size is None:
        texts = builtin_texts(source.removeprefix(BUILTIN_PREFIX))
        return train_sentencepiece(texts, path, vocab_size=None, model_type="word", byte_fallback=False)
    texts = (text for pair in pairs for text in (pair.prompt, pair.rationale, pair.answer) if text is not None)
    return train_sentencepiece(texts, path, vocab_size=vocab_size or DEFAULT_VOCAB_SIZE)


def _check(options: ReadOptions, source: str, count: int | None, flag: str) -> None:
    if options.data_format != "auto":
        format_named(options.data_format)
    if options.finqa_answer not in FINQA_ANSWERS:
        hint = did_you_mean(options.finqa_answer, FINQA_ANSWERS, f"it is one of {', '.join(FINQA_ANSWERS)}")
        raise UserError(f"--finqa-answer {options.finqa_answer} is not known; {hint}")
    if count is not None and count < 1:
        raise UserError(f"{flag} {source} was asked for {count} examples; ask for at least 1")


def _detected(
    options: ReadOptions, records: Iterator[Record | RecordError]
) -> tuple[DataFormat, Iterator[Record | RecordError]]:
    """The format, and all the records again. "auto" looks at the first good one."""
    if options.data_format != "auto":
        return format_named(options.data_format), records
    read: list[Record | RecordError] = []
    for record in records:
        read.append(record)
        if not isinstance(record, RecordError):
            return recognise(*record, options), itertools.chain(read, records)
    return FORMATS["jsonl"], iter(read)  # every record is bad
