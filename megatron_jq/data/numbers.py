"""F2: which texts are a number, by a closed grammar, and what its exact value and unit are. Pure functions of text.

    quantity  sign? currency? sign? number scale* (currency | percent | unit)? (("/" | "per") unit)?
    number    digits, grouped or not, with a decimal point and an exponent ("1,080.5", "1,00,000", "1'080", "5e-3",
              "5×10^3"), or a fraction ("1/2", "2 1/2")
    scale     "k", "M", "bn", "million", "dozen", … (units.py, as are currencies, percent and units)

Around it may stand Markdown or LaTeX (`**29**`, `\\boxed{29}`, `$29$`), quotes, a full stop, and accounting's
parentheses, which are a minus: (1,234) is -1234. What is no full parse is no number: "5 squared", "2π", "10:30", "5th".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction

from megatron_jq.data.units import (
    ANGLES,
    CURRENCY_SIGNS,
    CURRENCY_WORDS,
    PERCENTS,
    SCALE_LETTERS,
    SCALE_WORDS,
    UNITS,
    UNITS_BELOW,
)

#: Most digits of a number written out, before and after the point: longer ones are texts.
MOST_DIGITS = 1000
LONGEST = 2 * MOST_DIGITS  # characters of a text that may be a number


@dataclass(frozen=True)
class Quantity:
    """An exact value in its unit; "" is none. Percent is a unit ("%"), of which basis points are hundredths.

    in_parts: it was written in basis points or per mille, whose name cannot be left out as a percent sign can.
    """

    value: Fraction
    unit: str = ""
    in_parts: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        """The one way to write it, which parses to the same: "1080.5 $", "-1/3", "60 km/h"."""
        return f"{_written(self.value)} {self.unit}".rstrip()


_SIGN = r"(?:[+-] ?|(?i:minus|negative) )"
_DIGITS = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]{1,3}(?:'[0-9]{3})+"
    r"|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?![0-9])(?:\.[0-9]*)?|\.[0-9]+)"
)
_POWER = r"10 ?(?:\^|\*\*) ?\{?(?P<power>[+-]?[0-9]{1,3})\}?"
_EXPONENT = rf"(?:[eE](?P<e>[+-]?[0-9]{{1,3}})(?![0-9])| ?[×x*·] ?{_POWER})"
_FRACTION = r"(?:(?P<whole>[0-9]+) )?(?P<above>[0-9]+) ?/ ?(?P<below>[0-9]+)(?! ?/)"
_CURRENCY = "|".join(re.escape(name) for name in sorted(CURRENCY_SIGNS, key=len, reverse=True))
_PLAIN = rf"(?P<digits>{_DIGITS})(?:{_EXPONENT})?"


def _beginning(number: str, sign: str) -> str:
    return rf"(?P<sign>{sign})?(?:(?i:(?P<before>{_CURRENCY})) ?)?(?P<inner>{sign})?(?:{number})"


_ANY_NUMBER = re.compile(
    _beginning(rf"{_FRACTION}|(?P<ten>{_POWER.replace('power', 'ten_power')})(?![0-9])|{_PLAIN}", _SIGN)
)
#: In the middle of a text no neighbour makes it part of a word, a date, a fraction or a version.
_PLAIN_INSIDE = _PLAIN.replace("[0-9]*)?|", "[0-9]+)?|")  # a full stop after the digits is the sentence's
_INSIDE = re.compile(rf"(?<![\w.,/:'])(?:{_beginning(_PLAIN_INSIDE, '[+-]')})")
_ENDS_BADLY = re.compile(r"[\w/:^]|[.,'][0-9]")
_WORDS_AFTER = re.compile(r" ?[^\s0-9][^\s]*(?: [^\s0-9][^\s]*){0,3}")
_SCALE = re.compile(r" ?([a-zA-Z]+)(?![^\W\d_])")
_RAISED = re.compile(r"(?:(square|sq\.?|cubic|cu\.?) )?([^\d^]+?)(?:\^([2-9]))?")
#: Name → (its unit, how much of one).
_AFTER = {
    **{name: (unit, 1) for name, unit in {**UNITS, **ANGLES, **CURRENCY_WORDS, **CURRENCY_SIGNS}.items()},
    **{name: ("%", share) for name, share in PERCENTS.items()},
}
_BELOW = {name: (unit, 1) for name, unit in UNITS_BELOW.items()}

_WRAPS = (
    ("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("```", "```"), ("`", "`"), ('"', '"'), ("'", "'"),
    ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"), ("\\fbox{", "}"),
    ("\\text{", "}"), ("\\textbf{", "}"), ("\\mathrm{", "}"), ("\\mathbf{", "}"),
)  # fmt: skip
_LATEX = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:text|mathrm|mbox|textbf|mathbf|textrm) ?\{([^{}]*)\}", r" \1 "),
        (r"\\[dt]?frac ?(?:\{ ?([0-9]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))", r" \1\2/\3\4"),
        (r"\\(?:times|cdot)(?![a-zA-Z])", "×"),
        (r"\^ ?\{? ?\\circ ?\}?|\\degree(?![a-zA-Z])", "°"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,:; ]|~", " "),
        (r"\\([$%])", r"\1"),
    )
)


def unwrapped(text: str) -> str:
    """Without Markdown, quotes, LaTeX's marks of mathematics or a full stop around all of it."""
    while True:
        text = text.strip().rstrip(" .") or text.strip()
        for opening, closing in _WRAPS:
            long_enough = len(text) > len(opening) + len(closing)
            if long_enough and text.casefold().startswith(opening) and text.endswith(closing):
                text = text[len(opening) : len(text) - len(closing)]
                break
        else:
            return text


def parse(text: str) -> Quantity | None:
    """The quantity that a text is, None where it is none.

    text: in NFKC, with ASCII's signs and single blanks (answers.py's folding), in its own casing.
    """
    if len(text) > LONGEST:
        return None
    text = unwrapped(_LEADING_EQUALS.sub("", unwrapped(text).rstrip(" .,;!")))
    if "\\" in text or "{" in text or "~" in text:
        for pattern, by in _LATEX:
            text = pattern.sub(by, text)
        text = unwrapped(" ".join(text.split()))
    quantity = _quantity(text)
    if quantity is None and (accounting := _ACCOUNTING.fullmatch(text)) is not None:
        quantity = _quantity(f"{accounting[1]}{accounting[2]}{accounting[3]}")
        # "(-5)" is -5: nobody writes it for 5
        return None if quantity is None else replace(quantity, value=-abs(quantity.value))
    return quantity


_LEADING_EQUALS = re.compile(r"^= ?(?!=)")
_ACCOUNTING = re.compile(r"([^()]*)\(([^()]+)\)([^()]*)")


def _quantity(text: str) -> Quantity | None:
    match = _ANY_NUMBER.match(text)
    return None if match is None else _with_tail(match, text[match.end() :])


def _with_tail(match: re.Match, tail: str) -> Quantity | None:
    """The quantity of a number and all that stands after it; None where that is no scale and no unit."""
    part = match.groupdict()
    if (part["sign"] and part["inner"]) or len(match[0]) > LONGEST:
        return None
    before = CURRENCY_SIGNS.get((part["before"] or "").casefold(), "")
    scale, tail = _scale(tail, money=bool(before))
    after = _unit(tail.strip().casefold(), before)
    value = None if after is None else _number(part)
    if value is None:
        return None
    sign = (part["sign"] or part["inner"] or "+")[0]
    unit, share = after
    value = value if sign == "+" else -value
    quantity = Quantity(value if scale == share == 1 else value * scale * share, unit, unit[:1] == "%" and share != 1)
    return quantity if len(str(quantity)) < MOST_DIGITS or _digits(quantity.value) <= MOST_DIGITS else None


def _scale(tail: str, *, money: bool) -> tuple[Fraction | int, str]:
    """(factor, what follows) of at most two scales: "hundred thousand"."""
    factor: Fraction | int = 1
    for _ in range(2):
        match = _SCALE.match(tail)
        name = match[1] if match else ""
        word_factor = SCALE_WORDS.get(name.casefold()) or SCALE_LETTERS.get(name.upper() if money else name)
        if word_factor is None or (factor != 1 and len(name) <= 3):  # "hundred thousand", but no "k k"
            break
        factor, tail = factor * word_factor, tail[match.end() :]
    return factor, tail


def _number(part: dict[str, str | None]) -> Fraction | None:
    if part.get("below"):
        below = int(part["below"])
        return int(part["whole"] or 0) + Fraction(int(part["above"]), below) if below else None
    if part.get("ten"):
        return Fraction(10) ** int(part["ten_power"])
    integer, _, decimals = re.sub("[, ']", "", part["digits"]).partition(".")
    exponent = int(part["e"] or part["power"] or 0) - len(decimals)
    digits = int(integer + decimals)
    return Fraction(digits * 10**exponent) if exponent >= 0 else Fraction(digits, 10**-exponent)


def _unit(tail: str, currency: str) -> tuple[str, Fraction | int] | None:
    """(unit, how much of one) by what stands after the number; currency: the one before it. None: no such unit."""
    above, per, below = tail, "", ""
    if tail not in _AFTER:  # "per cent" is
        above, per, below = f" {tail}".partition("/" if "/" in tail else " per ")
    above = above.strip()
    unit = (currency, 1) if not above else _raised(above.removesuffix(" old") or above, _AFTER)
    if unit is None or (currency and unit[0] != currency) or (above.endswith(" old") and unit[0] != "year"):
        return None
    if not per:
        return unit
    under = _raised(below.strip(), _BELOW)
    return None if under is None or not unit[0] else (f"{unit[0]}/{under[0]}", unit[1])


def _raised(name: str, names: dict[str, tuple[str, Fraction | int]]) -> tuple[str, Fraction | int] | None:
    """ "square feet" and "ft^2" are one unit."""
    if name in names:
        return names[name]
    match = _RAISED.fullmatch(name)
    if match is None or match[2] not in UNITS_BELOW or (match[1] and match[3]):
        return None
    power = match[3] or (match[1] and ("2" if match[1][0] == "s" else "3"))
    return (f"{UNITS_BELOW[match[2]]}^{power}", 1) if power else None


def _digits(value: Fraction) -> int:
    return sum(map(str.isdigit, _written(value)))


def _written(value: Fraction) -> str:
    """Decimal where that ends within MOST_DIGITS places, else a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    twos, fives, rest = 0, 0, value.denominator
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    places = max(twos, fives)
    if rest != 1 or places > MOST_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    integer, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    sign = "-" if value < 0 else ""
    return f"{sign}{integer}.{decimals}" if decimals else f"{sign}{integer}"


def with_numbers_rewritten(text: str) -> str:
    """Every number inside a text (casefolded) in its one way of writing, so that a part of it can be looked for."""
    parts, end = [], 0
    for start, stop, quantity in _numbers_inside(text):
        parts += [text[end:start], str(quantity)]
        end = stop
    return "".join([*parts, text[end:]])


def _numbers_inside(text: str) -> Iterator[tuple[int, int, Quantity]]:
    """(start, end, quantity) of each, with the longest unit that follows it."""
    end = 0
    for match in _INSIDE.finditer(text):
        if match.start() < end:
            continue
        for stop in _ends(text, match.end()):
            quantity = None if _ENDS_BADLY.match(text, stop) else _with_tail(match, text[match.end() : stop])
            if quantity is not None:
                yield match.start(), stop, quantity
                end = stop
                break


def _ends(text: str, start: int) -> list[int]:
    """Where a quantity may end whose number ends at start, furthest first: after four words at most, or at once."""
    match = _WORDS_AFTER.match(text, start, start + 80)
    stops = [] if match is None else [start + len(match[0])]
    while stops and (blank := text.rfind(" ", start + 1, stops[-1])) > start:
        stops.append(blank)
    bare = [start + len(text[start:stop].rstrip(".,;:!?)*\"'`")) for stop in stops]
    return [*sorted({*stops, *bare} - {start}, reverse=True), start]
