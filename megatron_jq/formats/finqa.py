"""F1: FinQA's official record: text around a table of a financial report, a question, and its answer.

Chen et al. 2021, "FinQA: A Dataset of Numerical Reasoning over Financial Data". The program and the gold evidence are
not read: the rationale is latent here.
"""

from megatron_jq.formats.fields import as_text, text_field
from megatron_jq.formats.linearise import blocks, table_text
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

#: final_result: the hub's form, which has no exe_ans; the last step's result as its program writes it.
FINQA_ANSWERS = ("exe_ans", "answer", "final_result")

SAMPLE = {
    "pre_text": ["revenue grew in 2017 ."],
    "post_text": ["figures are rounded ."],
    "table": [["", "2017", "2016"], ["revenue", "$ 12.5", "$ 10.0"]],
    "qa": {"question": "what was the growth rate of revenue ?", "answer": "25%", "exe_ans": 0.25},
    "id": "AAA/2017/page_41.pdf-1",
}


def is_finqa(record: dict, options: ReadOptions) -> bool:
    """Whether a parsed record has FinQA's form."""
    return "table" in record and "pre_text" in record and ("qa" in record or "question" in record)


def finqa_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """Text before, table, text after, question; the gold is the program's result "exe_ans" (on the hub
    "final_result") or the annotator's "answer", as the file writes it. Where the fields of "qa" stand at the top level,
    as on the hub, they are taken from there.

    RecordError: no question, no gold, a ragged table, neither text nor table.
    """
    gold_field = options.finqa_answer
    qa = record.get("qa", record)
    if not isinstance(qa, dict):
        raise RecordError(place, "no question", "field 'qa' is not an object")
    question = text_field(qa, "question", place)
    if gold_field not in qa and (others := [name for name in FINQA_ANSWERS if name in qa]):
        fix = " or ".join(f"--finqa-answer {name}" for name in others)
        raise RecordError(place, f"no {gold_field}", f"no field {gold_field!r}; the record has another gold: {fix}")
    gold = text_field(qa, gold_field, place, "--finqa-answer").strip()
    before, after = (_sentences(record, field, place) for field in ("pre_text", "post_text"))
    table = table_text(record.get("table", []), place)
    context = blocks(before, table, after)
    if not context.strip():
        raise RecordError(place, "empty context", "text and table are empty; there is nothing to reckon on")
    parts = {"pre_text": before, "table": table, "post_text": after, "context": context, "question": question}
    return Pair(blocks(context, question), gold, place, parts=tuple(parts.items()))


def _sentences(record: dict, field: str, place: str) -> str:
    sentences = record.get(field, [])
    if not isinstance(sentences, list):
        raise RecordError(place, "no context", f"field {field!r} is not a list of sentences")
    texts = (as_text(s, f"a sentence of {field!r}", place, kind="no context", empty_allowed=True) for s in sentences)
    return " ".join(text.strip() for text in texts if text.strip())
