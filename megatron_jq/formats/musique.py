"""F1: MuSiQue's official record (the answerable set): paragraphs, a question of several hops, an answer, its aliases.

Trivedi et al. 2022, "MuSiQue: Multihop Questions via Single-hop Question Composition". The decomposition is not read.
"""

from megatron_jq.formats.fields import as_text, distinct_aliases, text_field
from megatron_jq.formats.linearise import blocks, passages_text
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

SAMPLE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Ada Holm", "paragraph_text": "Ada Holm was born in Aldeby.", "is_supporting": True},
        {"idx": 1, "title": "Aldeby", "paragraph_text": "Aldeby lies on the river Yar.", "is_supporting": True},
    ],
    "question": "On which river lies the birthplace of Ada Holm?",
    "answer": "river Yar",
    "answer_aliases": ["Yar", "the Yar"],
    "answerable": True,
}


def is_musique(record: dict, options: ReadOptions) -> bool:
    """Whether a parsed record has MuSiQue's form."""
    return "question" in record and isinstance(record.get("paragraphs"), list)


def musique_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """Paragraphs as "Title: text", then the question. RecordError: as for HotPotQA, and for a question that the set
    itself marks as not answerable.
    """
    answerable = record.get("answerable", True)
    if answerable is False:
        raise RecordError(place, "not answerable", "answerable is false; take the answerable set (musique_ans)")
    if answerable is not True:
        detail = f"field 'answerable' is {answerable!r}; it must be true or false"
        raise RecordError(place, "answerable or not", detail)
    question = text_field(record, "question", place)
    answer = text_field(record, "answer", place).strip()
    aliases = record.get("answer_aliases", [])
    if not isinstance(aliases, list):
        raise RecordError(place, "no aliases", "field 'answer_aliases' is not a list")
    aliases = [
        as_text(alias, "an item of 'answer_aliases'", place, kind="no aliases", empty_allowed=True).strip()
        for alias in aliases
    ]
    context = passages_text(_paragraphs(record.get("paragraphs"), place), place)
    parts = {"context": context, "question": question}
    prompt = blocks(context, question)
    return Pair(prompt, answer, place, distinct_aliases(answer, aliases), tuple(parts.items()))


def _paragraphs(paragraphs: object, place: str) -> list[tuple[str, str]]:
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, dict) for paragraph in paragraphs):
        raise RecordError(place, "no context", "field 'paragraphs' is not a list of objects")
    return [
        tuple(
            as_text(paragraph.get(field), f"{field!r} of a paragraph", place, kind="no context", empty_allowed=True)
            for field in ("title", "paragraph_text")
        )
        for paragraph in paragraphs
    ]
