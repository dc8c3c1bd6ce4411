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


def musique_pair(where: str, record: dict, options: ReadOptions) -> Pair:
    """Paragraphs as "Title: text", then the question. RecordError: as for HotPotQA, and for a question that the set
    itself marks as not answerable.
    """
    answerable = record.get("answerable", True)
    if answerable is False:
        raise RecordError(where, "not answerable", "answerable is false; take the answerable set (musique_ans)")
    if answerable is not True:
        detail = f"field 'answerable' is {answerable!r}; it must be true or false"
        raise RecordError(where, "answerable or not", detail)
    question = text_field(record, "question", where)
    answer = text_field(record, "answer", where).strip()
    aliases = record.get("answer_aliases", [])
    if not isinstance(aliases, list):
        raise RecordError(where, "no aliases", "field 'answer_aliases' is not a list")
    aliases = [
        as_text(alias, "an item of 'answer_aliases'", where, kind="no aliases", empty_allowed=True).strip()
        for alias in aliases
    ]
    context = passages_text(_paragraphs(record.get("paragraphs"), where), where)
    parts = {"context": context, "question": question}
    prompt = blocks(context, question)
    return Pair(prompt, answer, where, distinct_aliases(answer, aliases), tuple(parts.items()))


def _paragraphs(paragraphs: object, where: str) -> list[tuple[str, str]]:
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, dict) for paragraph in paragraphs):
        raise RecordError(where, "no context", "field 'paragraphs' is not a list of objects")
    return [
        tuple(
            as_text(paragraph.get(field), f"{field!r} of a paragraph", where, kind="no context", empty_allowed=True)
            for field in ("title", "paragraph_text")
        )
        for paragraph in paragraphs
    ]
