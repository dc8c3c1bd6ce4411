"""F2: the answer inside a text that was not asked for in our format, by one of four ways. Pure functions of text.

    none         the text as it is: of a policy that is trained here, all after `</think>` is the answer
    last-number  the last number, with its sign, scale, currency and unit, if numbers.py's grammar reads all of it: no
                 piece of a word, date, range or expression (last_number.py)
    boxed        the content of the last \\\\boxed{…}, whose braces are balanced
    answer-is    what follows the last "answer is" (or "answer:") in its sentence, on its line

A text that holds none has the empty answer, which is wrong.
"""

import re

from megatron_jq.data.answers import folded
from megatron_jq.data.last_number import last_number

EXTRACTIONS = ("none", "last-number", "boxed", "answer-is")

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_IS = re.compile(r"\banswer\s*(?:is\s*:|is\b|:)", re.IGNORECASE)
_ENDS = re.compile(r"[.!;](?=[*_]*(?:\s|$))")  # 3.5 has no end inside
_CONJUNCTIONS = re.compile(r"(?:(?:therefore|thus|hence|then)\b[,:]?\s+)+")
#: A full stop after one of these ends no sentence: titles, initials in the middle of a name, "U.S."
_ABBREVIATION = re.compile(
    r"\b(?:Dr|Mrs?|Ms|St|Mt|Ft|Prof|Gen|Sen|Rep|Lt|Col|[Rr]s|No|vs|approx|i\.e|e\.g|[A-Z]\.[A-Z]|(?<=\S )[A-Z]|^[F-Z])$"
)


def extract(text: str, how: str) -> str:
    """The answer in a sampled text, how being one of EXTRACTIONS; "" where there is none."""
    if how == "none":
        return text
    return {"last-number": _last_number, "boxed": _boxed, "answer-is": _answer_is}[how](text)


def _last_number(text: str) -> str:
    return last_number(folded(re.sub(r"(?<=[A-Za-z])—(?=\S)", ": ", text)))


def _boxed(text: str) -> str:
    for opening in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[opening.end() :]):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : opening.end() + brace.start()].strip()
    return ""


def _answer_is(text: str) -> str:
    marks = list(_ANSWER_IS.finditer(text))
    if not marks:
        return ""
    line = (text[marks[-1].end() :].lstrip(" \t\r\n:*_").splitlines() or [""])[0]
    line = _CONJUNCTIONS.sub("", line, count=1) if _CONJUNCTIONS.match(line) else line
    for end in _ENDS.finditer(line):
        before = line[max(0, end.start() - 12) : end.start()]
        if end[0] != "." or not line[end.end() :].strip("*_ \t") or not _ABBREVIATION.search(before):
            line = line[: end.start()]
            break
    return line.strip().rstrip(" \t*_")
