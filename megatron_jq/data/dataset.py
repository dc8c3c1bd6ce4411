"""F2: from the name of a data source to its pairs, and to a tokenizer trained on them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_jq.data.faults import BadRecords, RecordError
from megatron_jq.data.finqa import FINQA_ANSWERS, finqa_pair, is_finqa
from megatron_jq.data.gsm8k import gsm8k_pair, gsm8k_rationale, is_gsm8k
from megatron_jq.data.hotpotqa import hotpotqa_pair, is_hotpotqa
from megatron_jq.data.hub import is_hub, read_hub
from megatron_jq.data.jsonl import Record, as_text, pair_of, read_records, text_field
from megatron_jq.data.musique import is_musique, musique_pair
from megatron_jq.data.pair import Pair
from megatron_jq.data.tasks import builtin_examples, builtin_texts
from megatron_jq.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

BUILTIN_PREFIX = "builtin:"
DATA_FORMATS = ("auto", "jsonl", "gsm8k", "finqa", "hotpotqa", "musique")
DEFAULT_BUILTIN_COUNT = {"train": 1024, "heldout": 128}
DEFAULT_VOCAB_SIZE = 1024
HUB_SPLITS = {"train": "train", "heldout": "validation", "test": "test"}

#: What "auto" asks of the first good record, in this order.
_RECOGNISED = {"finqa": is_finqa, "hotpotqa": is_hotpotqa, "musique": is_musique, "gsm8k": is_gsm8k}
#: The field that names a record, of the formats that have one.
_ID_FIELDS = {"finqa": ("id",), "hotpotqa": ("_id", "id"), "musique": ("id",)}


@dataclass(frozen=True)
class ReadOptions:
    """How records become pairs. The names are the flags'. id_field: None takes the format's own, where it has one.
    rationales: every record must have a given one, in rationale_field; None takes GSM8K's worked solution.
    """

    data_format: str = "auto"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    id_field: str | None = None
    finqa_answer: str = "exe_ans"
    bad_records: str = "error"
    rationale_field: str | None = None
    rationales: bool = False


@dataclass(frozen=True)
class Source:
    """What a data source gave. data_format: the one that was found; "builtin" for a built-in task."""

    pairs: tuple[Pair, ...]
    data_format: str
    bad: tuple[RecordError, ...] = ()


def load_source(
    source: str,
    options: ReadOptions,
    *,
    count: int | None = None,
    seed: int = 0,
    split: str = "train",
    flag: str = "--train-data",
) -> Source:
    """The pairs of "builtin:KIND", of "hub:NAME…", or of a file of JSON records.

    A built-in kind gives `count` examples of the split, drawn from the seed (None: 1024 to train, 128 held out). A file
    is one split, whatever `split` says, and gives its first `count` pairs in order (None: all). `flag` is the option
    that named the source. data_format "auto" takes a file for a known data set's when its first good record has that
    form and no other prompt field was asked for. UserError: an unknown option, a source that cannot be read; bad
    records, unless options.bad_records says to drop them.
    """
    _check(options, source, count, flag)
    if is_builtin(source):
        if options.rationales:
            raise UserError(f"{flag} {source}: built-in tasks give no rationales, and --estimator sft needs them")
        kind = source.removeprefix(BUILTIN_PREFIX)
        drawn = builtin_examples(kind, split, count or DEFAULT_BUILTIN_COUNT.get(split, 1), seed)
        return Source(
            tuple(Pair(prompt, answer, f"{source}[{row}]") for row, (prompt, answer) in enumerate(drawn)), "builtin"
        )
    records = read_hub(source, HUB_SPLITS[split], flag=flag) if is_hub(source) else read_records(source, flag=flag)
    data_format, records = _detected(options, records)
    bad = BadRecords(options.bad_records)
    pairs = bad.sieve(records, _converter(data_format, options))
    bad.settle(f"{flag} {source}", len(pairs))
    return Source(tuple(pairs[:count]), data_format, tuple(bad.faults))


def is_builtin(source: str) -> bool:
    return source.startswith(BUILTIN_PREFIX)


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
    formats, answers = ("data-format", DATA_FORMATS), ("finqa-answer", FINQA_ANSWERS)
    for value, (name, known) in ((options.data_format, formats), (options.finqa_answer, answers)):
        if value not in known:
            hint = did_you_mean(value, known, f"it is one of {', '.join(known)}")
            raise UserError(f"--{name} {value} is not known; {hint}")
    if count is not None and count < 1:
        raise UserError(f"{flag} {source} was asked for {count} examples; ask for at least 1")


def _detected(
    options: ReadOptions, records: Iterator[Record | RecordError]
) -> tuple[str, Iterator[Record | RecordError]]:
    """The format, and all the records again."""
    if options.data_format != "auto":
        return options.data_format, records
    read: list[Record | RecordError] = []
    for record in records:
        read.append(record)
        if not isinstance(record, RecordError):
            break
    return _format_of(read[-1], options.prompt_field), _chained(read, records)


def _chained(first: list[Record | RecordError], rest: Iterator) -> Iterator[Record | RecordError]:
    yield from first
    yield from rest


def _format_of(record: Record | RecordError, prompt_field: str) -> str:
    if isinstance(record, RecordError):
        return "jsonl"  # every record is bad
    _, fields = record
    if prompt_field in fields and prompt_field != "question":
        return "jsonl"
    return next((name for name, recognised in _RECOGNISED.items() if recognised(fields)), "jsonl")


def _converter(data_format: str, options: ReadOptions) -> Callable[[Record], Pair]:
    """One record → its pair. RecordError: a fault of the record, or an id that an earlier one had."""
    convert = {
        "jsonl": lambda where, record: pair_of(where, record, options.prompt_field, options.answer_field),
        "gsm8k": gsm8k_pair,
        "finqa": lambda where, record: finqa_pair(where, record, options.finqa_answer),
        "hotpotqa": hotpotqa_pair,
        "musique": musique_pair,
    }[data_format]
    id_fields = (options.id_field,) if options.id_field else _ID_FIELDS.get(data_format, ())
    rationale = _rationale_reader(data_format, options)
    seen: dict[str, str] = {}

    def one(record: Record) -> Pair:
        where, fields = record
        name = next((field for field in id_fields if field in fields), None)
        if name is not None:
            identity = as_text(fields[name], f"field {name!r}", where, kind="no id")
            if identity in seen:
                detail = f"id {identity!r} stands at {seen[identity]} already; keep one of the two"
                raise RecordError(where, "duplicate id", detail)
            seen[identity] = where
        return replace(convert(where, fields), rationale=rationale(where, fields))

    return one


def _rationale_reader(data_format: str, options: ReadOptions) -> Callable[[str, dict], str | None]:
    """(where, record) → its given rationale, None where none is asked for. RecordError: it has none."""
    if not options.rationales:
        return lambda where, fields: None
    field = options.rationale_field
    if field is not None:
        return lambda where, fields: text_field(fields, field, where, "--rationale-field").strip()
    return gsm8k_rationale if data_format == "gsm8k" else _no_rationale


def _no_rationale(where: str, fields: dict) -> str:
    raise RecordError(where, "no rationale", "no given rationale to imitate; name its field with --rationale-field")
