"""F2: the last number inside a text, as a whole by numbers.py's grammar, or none. Pure functions of text.

Tokens stand between blanks. The last with a digit in it that is no name ("GPT-4", "CO2") is where the number must be:
the longest run of tokens around it that the grammar reads. Where there is no such run ("5-6", "2018-12-18", "x^5"), or
it is an operand ("5 + 6", "5 squared"), the text has no number: a piece of it would be another value.
"""

import re

from megatron_jq.data.numbers import LONGEST, parse, unwrapped
from megatron_jq.data.units import CURRENCY_SIGNS, UNITS_BELOW

_MATHS = re.compile(r"\$([^$]*[=≈<>][^$]*)\$(?![0-9])")  # "$x = 5$": its last dollar is no currency
_RELATION = re.compile(r"([=≈≃≅≤≥<>→]|(?<=[a-zA-Z]):(?=\S))")
_DIGIT = re.compile(r"[0-9]")
_NAME = re.compile(r"[^\w\\]*(?![a-zA-Z]-)[a-zA-Z][\w.-]*\W*")
_CLOSED = re.compile(r"[.,;:!?][*_\"'`)\]}$]*$")
_OPERATORS = frozenset((*"+-*/×x·^÷", "**", "\\times", "\\cdot", "\\div", "plus", "minus"))
_OPERATOR_WORDS = frozenset(("times", "over", "by", "power"))  # after an operand: "5 times 6", "5 to the power 6"
_OPERATION_AFTER = frozenset(("squared", "cubed", "factorial", "pi", "π", "th", "st", "nd", "rd", "plus", "minus"))
_UNIT_POWER = re.compile(r"(?:[a-z]+/)?([a-z]+)\^[2-9](?![0-9])")
_AND_A_PART = re.compile(r"and (?:a|one|two|three) (?:half|halves|third|quarter|fourth|fifth|eighth|tenth)s?\b")
_MAY_PRECEDE = frozenset(("", "minus", "negative", "u.s.", "x"))
_CURRENCY = re.compile("|".join(re.escape(name) for name in sorted(CURRENCY_SIGNS, key=len, reverse=True)))
_AROUND = "\"'*_`([{+-"
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))
_MOST_BEFORE, _MOST_AFTER = 45, 6  # tokens: 1000 digits in groups are texts long before; "thousand kilometers per hour"


def last_number(text: str) -> str:
    """The last number of a text (folded as for parse), as it is written there; "" where there is none."""
    tokens = _RELATION.sub(r" \1 ", _MATHS.sub(r" \1 ", text)).split(" ")
    tokens = [token for token in tokens if token]
    for at in range(len(tokens) - 1, -1, -1):
        if not _DIGIT.search(tokens[at]) or _is_unit(tokens[at]):
            continue
        number = _around(tokens, at)
        if number or not _NAME.fullmatch(tokens[at]):
            return number
    return ""


def _around(tokens: list[str], at: int) -> str:
    """The longest run of tokens with tokens[at] in it that is a number and no operand; "" where there is none."""
    first, last = at, at + 1
    while first > 0 and at - first < _MOST_BEFORE and _joins(tokens[first - 1]):
        first -= 1
    while last < len(tokens) and last - at < _MOST_AFTER and not _CLOSED.search(tokens[last - 1]):
        last += 1
    for start in range(first, at + 1):
        for stop in range(last, at, -1):
            number = _trimmed(" ".join(tokens[start:stop]))
            if number:
                closed = _CLOSED.search(tokens[stop - 1])
                operand = _follows(tokens, start) or (not closed and _is_followed(tokens[stop : stop + 3]))
                return "" if operand else number
    return ""


def _is_unit(token: str) -> bool:
    """ "ft^2" after its number."""
    power = _UNIT_POWER.match(token.casefold())
    return power is not None and power[1] in UNITS_BELOW


def _joins(token: str) -> bool:
    """Whether a number may go on after a token: digits, a sign, a currency, LaTeX; not after punctuation."""
    bare = token.lstrip(_AROUND).casefold()
    if currency := _CURRENCY.match(bare):
        bare = bare[currency.end() :].lstrip(_AROUND)
    if bare in _MAY_PRECEDE or "\\" in token:
        return True
    return not re.search(r"[a-z=≈≃≅≤≥<>→|]", bare) and not _CLOSED.search(token)


def _trimmed(text: str) -> str:
    """A text, or what is left of it without punctuation and brackets of which it has one half, if that is a number."""
    while 0 < len(text) <= LONGEST:
        if (quantity := parse(text)) is not None:
            bare = unwrapped(text.rstrip(" .,;!"))
            return bare if parse(bare) == quantity else text
        before = text
        for opening, closing in _PAIRS:
            if text.endswith(closing) and text.count(closing) > text.count(opening):
                text = text[:-1].removesuffix("\\")
            if text.startswith(opening) and text.count(opening) > text.count(closing):
                text = text[1:]
        for mark in ("*", '"', "'", "`", "_", "#", "~"):
            text = text.strip(mark) if text.startswith(mark) != text.endswith(mark) else text
        text = text.lstrip(": ").rstrip(".,;:!? ")
        if text.startswith(("\\(", "\\[")) and "\\)" not in text and "\\]" not in text:
            text = text[2:]
        if text == before:
            break
    return ""


def _follows(tokens: list[str], start: int) -> bool:
    """Whether tokens[start:] go on with an expression that begins before them: "5 - 6", "5 × 6", "5 times 6"."""
    if start == 0:
        return False
    before = tokens[start - 1].casefold()
    if tokens[start][:1] in ("+", "-") or tokens[start] in ("plus", "minus"):
        return _is_operand(before)
    if before == "of" and start > 1 and tokens[start - 2].casefold() == "power":
        return True
    operator = before in _OPERATORS or before in _OPERATOR_WORDS or before[-1] in "+-*/×·^÷"
    return operator and start > 1 and (before in ("power", "by") or _is_operand(tokens[start - 2]))


def _is_operand(token: str) -> bool:
    return bool(re.search(r"[0-9)}%$!]$|[0-9][a-zA-Z%°]*$", token)) or bool(re.fullmatch(r"[($\\{]*[b-zB-Z]", token))


def _is_followed(after: list[str]) -> bool:
    """Whether what stands after a number makes another value of it: "squared", "× n", "x", "and a half"."""
    if not after:
        return False
    word = re.sub(r"[.,;:!?)\]}$*]+$", "", after[0].casefold()) or after[0]
    if word in _OPERATION_AFTER or re.fullmatch(r"[b-z]|[+*/×·^÷√].*|-[^-]+|\\(?!\)|\]|text|quad).+", word):
        return True
    if word in _OPERATORS and len(after) > 1:  # "5 - n", but "5 - as we saw"
        return word != "-" or re.fullmatch(r"[a-zA-Z]|\W+\w*", after[1].rstrip(".,;:!?$")) is not None
    return _AND_A_PART.match(" ".join(after).casefold()) is not None
