"""F1: records of any kind whose prompt and answer stand in fields that flags name: --prompt-field, --answer-field."""

from megatron_jq.formats.fields import answers_of, lookup, text_field
from megatron_jq.formats.messages import ends_with_answer
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

SAMPLE = {"prompt": "two and two is", "answer": ["4", "four"]}


def has_named_fields(record: dict, options: ReadOptions) -> bool:
    """Whether the prompt's field is there, as text. "question" is also the prompt's field of published sets, and names
    no form. An answer beside a conversation that has an answer already is of this form too.
    """
    field = options.prompt_field
    if field in record:
        return field != "question" and not isinstance(record[field], list)
    return options.answer_field in record and ends_with_answer(record.get("messages"))


def named_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """Return the pair of two fields. A value is a non-empty string, or a number, which is taken as its text in the
    file. A list of answers is the gold one and others that count as right.

    RecordError: a field that is missing, empty or of another kind.
    """
    field = options.prompt_field
    if isinstance(lookup(record, field), list):
        detail = f"field {field!r} is a list; write a string, or give --data-format messages for chat messages"
        raise RecordError(place, f"no {field}", detail)
    if field not in record and isinstance(record.get("conversations"), list):
        detail = "'conversations' is not read; write it as 'messages', with 'role' and 'content' for 'from' and 'value'"
        raise RecordError(place, f"no {field}", detail)
    prompt = text_field(record, field, place, "--prompt-field")
    gold, aliases = answers_of(record, options.answer_field, place, "--answer-field")
    return Pair(prompt, gold, place, aliases)
