"""F2: a source's records as pairs: its format's reader, and what holds for all: ids, rationales, gold answers."""

from collections import Counter
from dataclasses import replace

from megatron_jq.data.jsonl import Record
from megatron_jq.formats.fields import as_text, lookup, text_field
from megatron_jq.formats.markers import bare_rationale, refuse_markers, spells_markers
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError
from megatron_jq.formats.row import DataFormat


class Converter:
    """One record → its pair, for a source's records in order."""

    def __init__(self, data_format: DataFormat, options: ReadOptions):
        self._format, self._options = data_format, options
        self._id_fields = (options.id_field,) if options.id_field else data_format.ids
        self._seen: dict[str, str] = {}  # id of a good record → its file and line
        self._changed: Counter[str] = Counter()

    def __call__(self, record: Record) -> Pair:
        """RecordError: the record cannot be used, or a good one before it has its id."""
        place, fields = record
        identity = self._identity(place, fields)
        pair = self._format.pair(place, fields, self._options)
        rationale = self._rationale(place, fields, pair)
        _refuse_marked_answers(pair)
        if identity is not None:
            if identity in self._seen:
                detail = f"id {identity!r} stands at {self._seen[identity]} already; keep one of the two"
                raise RecordError(place, "duplicate id", detail)
            self._seen[identity] = place
        answer = pair.answer.strip()
        self._changed["gold answers had blanks at their ends"] += answer != pair.answer
        return replace(pair, answer=answer, rationale=rationale)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken off texts, a line for each kind."""
        return tuple(f"{count} {what}, which were taken off" for what, count in self._changed.items() if count)

    def _identity(self, place: str, fields: dict) -> str | None:
        """Its id as text, so that 1 and "1" are the same; None where it has none."""
        for name in self._id_fields:
            value = lookup(fields, name)
            if value is not None or name in fields:
                return as_text(value, f"field {name!r}", place, kind="no id").strip()
        return None

    def _rationale(self, place: str, fields: dict, pair: Pair) -> str | None:
        """Its given rationale; None where none is asked for. RecordError: it has none, or one with markers inside."""
        field = self._options.rationale_field
        if not self._options.rationales:
            return None
        if field is not None:
            text, what = text_field(fields, field, place, "--rationale-field"), f"field {field!r}"
        elif self._format.rationale is not None:
            text, what = self._format.rationale(place, fields), "the worked solution"
        elif pair.rationale is not None:
            text, what = pair.rationale, "the rationale"
        else:
            detail = "no given rationale to imitate; name its field with --rationale-field"
            raise RecordError(place, "no rationale", detail)
        bare = bare_rationale(text, what, place)
        self._changed["given rationales stood in <think> … </think>"] += spells_markers(text)
        return bare


def _refuse_marked_answers(pair: Pair) -> None:
    fix = "give the answer alone, and a rationale in a field of its own (--rationale-field, for --estimator sft)"
    for text in (pair.answer, *pair.aliases):
        refuse_markers(text, "the gold answer", fix, pair.place)
