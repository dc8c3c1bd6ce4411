"""F2: what makes two answers the same. Pure functions of text, one rule a kind of data set.

    none    blanks at the ends aside, the text as it is: the training reward
    text    and: Unicode forms (NFKC), casing, runs of blanks, kinds of quotes and dashes, a full stop at the end
    squad   and: no punctuation, no articles; SQuAD's rule, which HotPotQA and MuSiQue score with
    number  a text that is a quantity (numbers.py): its exact value, however it is written; any other as under text,
            without Markdown around it (FinQA, GSM8K)

A normalised answer is its key. Answers of one key are right or wrong together, and vote together.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Literal

from megatron_jq.data.numbers import Quantity, parse, unwrapped, with_numbers_rewritten
from megatron_jq.errors import UserError
from megatron_jq.formats.row import RULES
from megatron_jq.formats.table import format_named
from megatron_jq.toml_files import did_you_mean

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—−﹣"), "-")
_QUOTES = {**dict.fromkeys(map(ord, "‘’‛′`´"), "'"), **dict.fromkeys(map(ord, "“”„″«»"), '"')}
_SIGNS = {**_DASHES, **_QUOTES, ord("\u2044"): "/"}  # the slash that NFKC makes of a fraction's bar
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation.replace("^", "")))  # 10^2 is not 102
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060" + string.whitespace + "\u00a0"  # of width zero, and blanks
_FRACTION = re.compile("[¼-¾⅐-⅟↉]")
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")


def rule_of(choice: str, data_format: str) -> str:
    """Return the rule that a setting names; "auto" is the data format's. UserError: an unknown rule or format."""
    if choice == "auto":
        return format_named(data_format).rule
    if choice not in RULES:
        hint = did_you_mean(choice, RULES, f"it is one of auto, {', '.join(RULES)}")
        raise UserError(f"--match-rule {choice} is not known; {hint}")
    return choice


def normalise(text: str, rule: str) -> str:
    """Return the answer's key under a rule of RULES. A text of which nothing would be left ("the") keeps more."""
    if rule == "none":
        return text.strip()
    if rule == "number":
        quantity = quantity_of(text)
        return _text(unwrapped(folded(text))) if quantity is None else str(quantity)
    plain = _text(text)
    return (_squad(plain) or plain) if rule == "squad" else plain


def quantity_of(text: str) -> Quantity | None:
    """The quantity that a text is by the rule "number"; None where it is none."""
    return parse(folded(text))


class AcceptedAnswers:
    """The gold answers of one prompt, y* first, as a match and a rule see them.

    A unit is read by the question, which the first gold that is a quantity stands for: where that names none, an
    answer's unit says nothing, but basis points and per mille are parts of 1, and with ratios=True a percentage is no
    number without its sign; where it names one, a number without a unit is in that unit. Equality is of keys, and so an
    equivalence.
    """

    def __init__(self, golds: Sequence[str], match: Literal["exact", "substring"], rule: str, *, ratios: bool = False):
        self._match, self._rule, self._unit, self._ratios = match, rule, "", ratios
        if rule == "number":
            quantities = (quantity_of(gold) for gold in golds)
            self._unit = next((quantity.unit for quantity in quantities if quantity is not None), "")
        keys = [self._key(gold) for gold in golds]
        self._first, self._keys = keys[0], frozenset(keys)
        self._parts = [self._searched(normalise(gold, rule)) for gold in golds]

    def key(self, answer: str) -> str:
        """Under which an answer votes. All that are equal to a gold answer have one: aliases say the same thing."""
        key = self._key(answer)
        return self._first if key in self._keys else key

    def accepts(self, key: str) -> bool:
        """Whether the answers of a key are right.

        exact: the key is a gold answer's. substring: or a gold answer is part of it, which is how the paper evaluates.
        An empty gold answer is part of nothing.
        """
        if key in self._keys:
            return True
        return self._match == "substring" and any(part in self._searched(key) for part in self._parts if part)

    def _key(self, answer: str) -> str:
        quantity = quantity_of(answer) if self._rule == "number" else None
        if quantity is None:
            return normalise(answer, self._rule)
        if self._unit:
            return str(Quantity(quantity.value, quantity.unit or self._unit))
        if quantity.in_parts:
            return str(Quantity(quantity.value / 100))
        return str(quantity if self._ratios and quantity.unit[:1] == "%" else Quantity(quantity.value))

    def _searched(self, key: str) -> str:
        return with_numbers_rewritten(key) if self._rule == "number" else key


def folded(text: str) -> str:
    """NFKC, with ASCII's quotes and dashes and single blanks, in its own casing.

    What NFKC would run together with the digits before it stays apart: 10² is not 102, and 3½ is not 31/2.
    """
    text = text.strip(_INVISIBLE)
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0], _FRACTION.sub(r" \g<0>", text)).replace("º", "°")
    return " ".join(unicodedata.normalize("NFKC", text).translate(_SIGNS).split())


def _text(text: str) -> str:
    joined = " ".join(unicodedata.normalize("NFKC", folded(text).casefold()).translate(_SIGNS).split())
    return joined.rstrip(" .") or joined


def _squad(text: str) -> str:
    """Rajpurkar et al. 2016 (arXiv:1606.05250), evaluation script: punctuation first, then articles, then blanks."""
    return " ".join(_ARTICLES.sub(" ", text.translate(_PUNCTUATION)).split())
