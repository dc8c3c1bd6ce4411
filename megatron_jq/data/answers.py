"""F2: what makes two answers the same. Pure functions of text, one rule a kind of data set.

    none    blanks at the ends aside, the text as it is: the training reward
    text    and: Unicode forms (NFKC), casing, runs of blanks, kinds of quotes and dashes, a full stop at the end
    squad   and: no punctuation, no articles; SQuAD's rule, which HotPotQA and MuSiQue score with
    number  text, and: thousands separators, zeros that say nothing, percent and currency signs; a unit that only one of
            the two answers names is passed over (FinQA, GSM8K)

A normalised answer is the key under which it votes.
"""

import re
import string
import unicodedata
from collections.abc import Iterable
from typing import Literal

from megatron_jq.errors import UserError
from megatron_jq.toml_files import did_you_mean

RULES = ("none", "text", "squad", "number")
MATCHES = ("exact", "substring")

#: Data format → its rule; formats that are not here have none.
RULE_OF_FORMAT = {"finqa": "number", "gsm8k": "number", "hotpotqa": "squad", "musique": "squad"}

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—−﹣"), "-")
_QUOTES = {**dict.fromkeys(map(ord, "‘’‛′`´"), "'"), **dict.fromkeys(map(ord, "“”„″«»"), '"')}
_SIGNS = {**_DASHES, **_QUOTES, ord("\u2044"): "/"}  # the slash that NFKC makes of a fraction's bar
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation.replace("^", "")))  # 10^2 is not 102

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_MAGNITUDE = r"(?:hundred|thousand|million|billion|trillion)\b"
#: A number where none of its neighbours makes it part of a word, a date, a fraction or a version.
_NUMBER = re.compile(rf"(?<![\w.,/:])([+-]?)({_DIGITS})(?![\w/:]|[.,]\d)")
_SPACED_GROUPS = re.compile(r"(?<![\w.,])[+-]?\d{1,3}(?: \d{3})+(?![\w,])")
_CURRENCY_BEFORE = re.compile(
    rf"([+-]?) ?(?<![^\W\d_])(us\$|usd|eur|gbp|[$€£¥]) ?([+-]?)({_DIGITS})((?: {_MAGNITUDE})?)(?![\w/:]|[.,]\d)"
)
_ATTACHED_UNIT = re.compile(r"(?<=\d)(?!(?:st|nd|rd|th)\b|e\d)(%|[$€£¥]|[^\W\d_]+(?:\^\d|/[a-z]+)?|°[cf])(?![\w.^])")
_UNIT_NAMES = (
    (re.compile(rf"(\d(?: {_MAGNITUDE})?) (?:per ?cent|percentage points?|pct)\b"), r"\1 %"),
    (re.compile(rf"(\d(?: {_MAGNITUDE})?) (?:us\$|usd\b|(?:us )?dollars?\b)"), r"\1 $"),
    (re.compile(rf"(\d(?: {_MAGNITUDE})?) (?:eur|euros?)\b"), r"\1 €"),
    (re.compile(rf"(\d(?: {_MAGNITUDE})?) (?:gbp|pounds? sterling)\b"), r"\1 £"),
)
#: A number and at most three words behind it. Magnitudes belong to the number; words that join are no units.
_WORD = rf"(?!(?:and|or|of|to|in|at)\b|{_MAGNITUDE})[^\W\d_]\S*"
_QUANTITY = re.compile(rf"(-?\d+(?:\.\d+)?(?: {_MAGNITUDE})?) (?:[%$€£¥]|°[cf]|{_WORD})(?: {_WORD}){{0,2}}")


def rule_of(choice: str, data_format: str) -> str:
    """The rule that a setting names; "auto" is the data format's. UserError for a name that there is not."""
    if choice == "auto":
        return RULE_OF_FORMAT.get(data_format, "none")
    if choice not in RULES:
        hint = did_you_mean(choice, RULES, f"it is one of auto, {', '.join(RULES)}")
        raise UserError(f"--normalise {choice} is not known; {hint}")
    return choice


def normalise(text: str, rule: str) -> str:
    """The answer's key under a rule of RULES. A text of which nothing would be left ("the") keeps more of itself."""
    plain = text.strip()
    if rule == "none":
        return plain
    plain = _text(plain)
    if rule == "text":
        return plain
    return {"squad": _squad, "number": _number}[rule](plain) or plain


def matches(answer: str, golds: Iterable[str], match: Literal["exact", "substring"], rule: str) -> bool:
    """Whether a normalised answer is right by one of the normalised gold answers.

    exact: they are equal (number: or equal once a unit that one of them lacks is passed over). substring: or the gold
    one is part of the answer, which is how the paper evaluates. An empty gold answer matches an empty answer alone.
    """
    return any(_same(answer, gold, rule) or (match == "substring" and gold != "" and gold in answer) for gold in golds)


def _same(answer: str, gold: str, rule: str) -> bool:
    if answer == gold:
        return True
    return rule == "number" and (without_unit(answer) == gold or answer == without_unit(gold))


def without_unit(key: str) -> str:
    """A quantity's number, with its magnitude ("12 million $" gives "12 million"); any other key as it is."""
    quantity = _QUANTITY.fullmatch(key)
    return quantity[1] if quantity else key


def _text(text: str) -> str:
    folded = unicodedata.normalize("NFKC", "".join(map(_spelled_out, text)))
    folded = unicodedata.normalize("NFKC", folded.casefold()).translate(_SIGNS)
    joined = " ".join(folded.split())
    return joined.rstrip(" .") or joined


def _spelled_out(character: str) -> str:
    """What NFKC would run together with the digits in front of it: 10² is not 102, and 3½ is not 31/2."""
    kind = unicodedata.decomposition(character)
    if kind.startswith("<super>") and unicodedata.digit(character, None) is not None:
        return "^" + character
    return " " + character if kind.startswith("<fraction>") else character


def _squad(text: str) -> str:
    """Rajpurkar et al. 2016 (arXiv:1606.05250), evaluation script: punctuation first, then articles, then blanks."""
    return " ".join(_ARTICLES.sub(" ", text.translate(_PUNCTUATION)).split())


def _number(text: str) -> str:
    """Every number of the text in one spelling, its sign or unit behind it after a blank: "$1,080.50" → "1080.5 $"."""
    text = _SPACED_GROUPS.sub(lambda found: found[0].replace(" ", ""), text)
    text = _CURRENCY_BEFORE.sub(_currency_behind, text)
    text = _ATTACHED_UNIT.sub(r" \1", text)
    text = _NUMBER.sub(lambda found: _canonical(found[1], found[2]), text)
    for pattern, sign in _UNIT_NAMES:
        text = pattern.sub(sign, text)
    return text


def _currency_behind(found: re.Match) -> str:
    """A currency's sign moves behind its number; a minus on either side of it is the number's."""
    before, sign, after, digits, magnitude = found.groups()
    blank = " " if found[0].startswith(" ") else ""
    return f"{blank}{'-' if '-' in (before, after) else ''}{digits}{magnitude} {sign}"


def _canonical(sign: str, digits: str) -> str:
    """On the digits themselves: a float or a Decimal of fixed precision would round long ones."""
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign == "-" and number != "0" else number
