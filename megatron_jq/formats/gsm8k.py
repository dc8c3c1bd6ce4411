"""F1: GSM8K's official record, {"question", "answer"}, whose answer is a worked solution with the gold after "####".

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". The worked solution is read as a given rationale
alone (SFT); elsewhere the rationale is latent.
"""

import re

from megatron_jq.formats.fields import text_field
from megatron_jq.formats.options import ReadOptions
from megatron_jq.formats.pair import Pair
from megatron_jq.formats.record_error import RecordError

GOLD_MARK = "####"
_MARK = re.compile(r"(?<!#)####(?!#)")
_LINE_END = re.compile(r"\r\n|\r|\n")
#: A number, with a currency's sign before it or a per cent sign after it.
_NUMBER = re.compile(r"[-+]?[$€£¥₹]?-?[\d.,]*\d[\d.,]*(?:[eE][-+]?\d+)?%?")
_NUMBER_FIRST = re.compile(r"[-+]?[$€£¥₹]?-?\d")
_LETTER = re.compile(r"[^\W\d_]")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


SAMPLE = {"question": "What is two and two?", "answer": "2 and 2 are <<2+2=4>>4.\n#### 4"}


def is_gsm8k(record: dict, options: ReadOptions) -> bool:
    """Whether a parsed line has GSM8K's form."""
    answer = record.get("answer")
    return "question" in record and isinstance(answer, str) and _MARK.search(answer) is not None


def gsm8k_pair(place: str, record: dict, options: ReadOptions) -> Pair:
    """RecordError: no question, no answer, or an answer without its mark or gold."""
    question, solution = (text_field(record, field, place) for field in ("question", "answer"))
    return Pair(question, gold_answer(solution, place), place)


def gold_answer(solution: str, place: str) -> str:
    """The line after the last "####", without the commas that group digits: "… #### 1,080" gives "1080".

    RecordError for what the official files never have, and what would come into y* or be lost from it: no mark, no
    gold, text after its line, words after its number, a calculator's annotation, an earlier mark with another number.
    """
    marks = list(_MARK.finditer(solution))
    if not marks:
        raise _refusal(place, f"the answer has no {GOLD_MARK!r} before its gold")
    gold, *after = _LINE_END.split(solution[marks[-1].end() :].strip())
    gold = gold.strip()
    if not gold:
        raise _refusal(place, f"nothing follows {GOLD_MARK!r}")
    if any(line.strip() for line in after):
        raise _refusal(place, f"text stands after the gold's line, {GOLD_MARK} {_short(gold)}", "text after the gold")
    if "<<" in gold or ">>" in gold:
        raise _refusal(place, f"the gold {_short(gold)!r} holds a calculator's annotation", "annotated gold")
    if _NUMBER_FIRST.match(gold) and _LETTER.search(gold) and not _NUMBER.fullmatch(gold):
        raise _refusal(place, f"the gold {_short(gold)!r} is a number and more", "text after the gold")
    _refuse_another_gold(solution, marks, gold, place)
    return _without_groups(gold)


def _refuse_another_gold(solution: str, marks: list[re.Match], gold: str, place: str) -> None:
    """An earlier line that is a mark and another number: the official evaluation would take that one."""
    for mark in marks[:-1]:
        before = _LINE_END.split(solution[: mark.start()])[-1]
        line = _LINE_END.split(solution[mark.end() :])[0].strip()
        is_gold = not before.strip() and _NUMBER.fullmatch(line)
        if is_gold and _without_groups(line) != _without_groups(gold):
            raise _refusal(place, f"two lines give a gold, {_short(line)!r} and {_short(gold)!r}", "two golds")


def _without_groups(gold: str) -> str:
    return _GROUPED.sub(lambda digits: digits[0].replace(",", ""), gold)


def _refusal(place: str, what: str, kind: str = "no answer") -> RecordError:
    fix = f"end the answer with one line, {GOLD_MARK} and the gold alone"
    return RecordError(place, kind, f"{what}; {fix}, or use --data-format jsonl to take the answer as it stands")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def gsm8k_rationale(place: str, record: dict) -> str:
    """The worked solution, which is what stands before the last "####", without blanks at its ends.

    The calculator's annotations, <<48/2=24>>, stay: they are part of the solutions as published. RecordError: no
    solution.
    """
    solution = text_field(record, "answer", place)
    marks = list(_MARK.finditer(solution))
    solution = solution[: marks[-1].start()].strip() if marks else ""
    if not solution:
        raise RecordError(place, "no rationale", f"no worked solution stands before {GOLD_MARK!r}; write one")
    return solution
