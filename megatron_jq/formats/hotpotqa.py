"""F1: HotPotQA's official record of the distractor setting: ten titled paragraphs, a question, a short answer.

Yang et al. 2018, "HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering". The supporting facts are
not read.
"""

from megatron_jq.formats.fields import as_text, text_field
from megatron_jq.formats.linearise import blocks, passages_text
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

SAMPLE = {
    "_id": "5a0",
    "answer": "Chief Clerk",
    "question": "What office did the author of The Long Ferry hold?",
    "supporting_facts": [["The Long Ferry", 0], ["Ada Holm", 1]],
    "context": [
        ["The Long Ferry", ["The Long Ferry is a novel by Ada Holm.", " It came out in 1931."]],
        ["Ada Holm", ["Ada Holm wrote five novels.", " She was Chief Clerk of the harbour."]],
    ],
}


def is_hotpotqa(record: dict, options: ReadOptions) -> bool:
    """Whether a parsed record has HotPotQA's form: that of its context, for some files have no supporting facts."""
    if "question" not in record:
        return False
    context = record.get("context")
    if "supporting_facts" in record:
        return isinstance(context, list | dict)
    if isinstance(context, dict):
        return isinstance(context.get("title"), list) and isinstance(context.get("sentences"), list)
    first = context[0] if isinstance(context, list) and context else None
    return isinstance(first, list) and len(first) == 2 and isinstance(first[0], str) and isinstance(first[1], list)


def hotpotqa_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """Paragraphs as "Title: text", then the question. RecordError: no question, no answer, an empty context."""
    question = text_field(record, "question", place)
    if record.get("answer") is None:
        detail = "no field 'answer'; the official test files are published without it: take train or dev"
        raise RecordError(place, "no answer", detail)
    answer = text_field(record, "answer", place).strip()
    context = passages_text(_paragraphs(record.get("context"), place), place)
    parts = {"context": context, "question": question}
    return Pair(blocks(context, question), answer, place, parts=tuple(parts.items()))


def _paragraphs(context: object, place: str) -> list[tuple[str, str]]:
    """[[title, [sentence, …]], …] of the official file, or {"title": […], "sentences": [[…], …]} of the hub."""
    malformed = RecordError(place, "no context", "field 'context' is not a list of [title, sentences]")
    if isinstance(context, dict):
        titles, texts = context.get("title"), context.get("sentences")
        if not isinstance(titles, list) or not isinstance(texts, list) or len(titles) != len(texts):
            raise malformed
        context = [list(both) for both in zip(titles, texts, strict=True)]
    if not isinstance(context, list):
        raise malformed
    passages = []
    for paragraph in context:
        if not (isinstance(paragraph, list) and len(paragraph) == 2 and isinstance(paragraph[1], list)):
            raise malformed
        title, *sentences = (
            as_text(text, "a text of 'context'", place, kind="no context", empty_allowed=True)
            for text in (paragraph[0], *paragraph[1])
        )
        passages.append((title, "".join(sentences)))  # sentences begin with the blank that separates them
    return passages
