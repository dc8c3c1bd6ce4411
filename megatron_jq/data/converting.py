"""F2: a source's records as pairs: each format's reader, and what holds for all: ids, rationales, gold answers."""

from collections import Counter
from dataclasses import dataclass, replace

from megatron_jq.data.faults import RecordError
from megatron_jq.data.finqa import finqa_pair, is_finqa
from megatron_jq.data.gsm8k import gsm8k_pair, gsm8k_rationale, is_gsm8k
from megatron_jq.data.hotpotqa import hotpotqa_pair, is_hotpotqa
from megatron_jq.data.jsonl import Record, as_text, lookup, pair_of, text_field
from megatron_jq.data.markers import bare_rationale, refuse_markers, spells_markers
from megatron_jq.data.messages import chat_format, messages_pair, verl_pair
from megatron_jq.data.musique import is_musique, musique_pair
from megatron_jq.data.pair import Pair

DATA_FORMATS = ("auto", "jsonl", "gsm8k", "finqa", "hotpotqa", "musique", "messages", "verl")
#: What "auto" asks of the first good record, in this order, where it is no chat.
_RECOGNISED = {"finqa": is_finqa, "hotpotqa": is_hotpotqa, "musique": is_musique, "gsm8k": is_gsm8k}
#: The field that names a record, of the formats that have one.
_ID_FIELDS = {"finqa": ("id",), "hotpotqa": ("_id", "id"), "musique": ("id",)}


@dataclass(frozen=True)
class ReadOptions:
    """How records become pairs. The names are the flags'. id_field: None takes the format's own, where it has one.
    rationales: every record must have a given one, in rationale_field; None takes the format's own, where it has one.
    """

    data_format: str = "auto"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    id_field: str | None = None
    finqa_answer: str = "exe_ans"
    bad_records: str = "error"
    rationale_field: str | None = None
    rationales: bool = False


def format_of(record: Record | RecordError, options: ReadOptions) -> str:
    """What "auto" means for a source by its first good record. UserError: a chat with two gold answers."""
    if isinstance(record, RecordError):
        return "jsonl"  # every record is bad
    where, fields = record
    if chat := chat_format(where, fields, options.prompt_field, options.answer_field):
        return chat
    if options.prompt_field in fields and options.prompt_field != "question":
        return "jsonl"
    return next((name for name, recognised in _RECOGNISED.items() if recognised(fields)), "jsonl")


class Converter:
    """One record → its pair, for a source's records in order."""

    def __init__(self, data_format: str, options: ReadOptions):
        self._format, self._options = data_format, options
        self._id_fields = (options.id_field,) if options.id_field else _ID_FIELDS.get(data_format, ())
        self._seen: dict[str, str] = {}  # the ids of good records → where they stand
        self._changed: Counter[str] = Counter()

    def __call__(self, record: Record) -> Pair:
        """RecordError: a fault of the record, or an id that a good one before it has."""
        where, fields = record
        identity = self._identity(where, fields)
        pair = self._read(where, fields)
        rationale = self._rationale(where, fields, pair)
        _refuse_marked_answers(pair)
        if identity is not None:
            if identity in self._seen:
                detail = f"id {identity!r} stands at {self._seen[identity]} already; keep one of the two"
                raise RecordError(where, "duplicate id", detail)
            self._seen[identity] = where
        answer = pair.answer.strip()
        self._changed["gold answers had blanks at their ends"] += answer != pair.answer
        return replace(pair, answer=answer, rationale=rationale)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken off texts, a line for each kind."""
        return tuple(f"{count} {what}, which were taken off" for what, count in self._changed.items() if count)

    def _read(self, where: str, fields: dict) -> Pair:
        options = self._options
        prompt_field, answer_field = options.prompt_field, options.answer_field
        readers = {
            "jsonl": lambda: pair_of(where, fields, prompt_field, answer_field),
            "gsm8k": lambda: gsm8k_pair(where, fields),
            "finqa": lambda: finqa_pair(where, fields, options.finqa_answer),
            "hotpotqa": lambda: hotpotqa_pair(where, fields),
            "musique": lambda: musique_pair(where, fields),
            "messages": lambda: messages_pair(where, fields, prompt_field, answer_field),
            "verl": lambda: verl_pair(where, fields, prompt_field),
        }
        return readers[self._format]()

    def _identity(self, where: str, fields: dict) -> str | None:
        """Its id as text, so that 1 and "1" are the same; None where it has none."""
        for name in self._id_fields:
            value = lookup(fields, name)
            if value is not None or name in fields:
                return as_text(value, f"field {name!r}", where, kind="no id").strip()
        return None

    def _rationale(self, where: str, fields: dict, pair: Pair) -> str | None:
        """Its given rationale; None where none is asked for. RecordError: it has none, or one with markers inside."""
        field = self._options.rationale_field
        if not self._options.rationales:
            return None
        if field is not None:
            text, what = text_field(fields, field, where, "--rationale-field"), f"field {field!r}"
        elif self._format == "gsm8k":
            text, what = gsm8k_rationale(where, fields), "the worked solution"
        elif pair.rationale is not None:
            text, what = pair.rationale, "the rationale"
        else:
            detail = "no given rationale to imitate; name its field with --rationale-field"
            raise RecordError(where, "no rationale", detail)
        bare = bare_rationale(text, what, where)
        self._changed["given rationales stood in <think> … </think>"] += spells_markers(text)
        return bare


def _refuse_marked_answers(pair: Pair) -> None:
    fix = "give the answer alone, and a rationale in a field of its own (--rationale-field, for --estimator sft)"
    for text in (pair.answer, *pair.aliases):
        refuse_markers(text, "the gold answer", fix, pair.where)
