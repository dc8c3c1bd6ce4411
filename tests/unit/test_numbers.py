"""The number rule's grammar: every way to write a value gives it back, exactly; other values are never equal to it."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.data.answers import AcceptedAnswers, normalise, quantity_of
from megatron_jq.data.numbers import MOST_DIGITS

#: Unit's one name → ways to write it after a number.
UNITS = {
    "": ("",),
    "%": ("%", " %", " percent", " per cent", " pct", "\\%", " percentage points"),
    "$": ("$", " $", " dollars", " USD", " US$", "\\$"),
    "€": ("€", " EUR", " euros"),
    "¢": ("¢", " cents"),
    "kg": (" kg", "kg", " kilograms", " KG"),
    "km/h": (" km/h", " kilometers per hour", " km / h"),
    "ft^2": (" square feet", " sq ft", " ft²", " ft^2"),
    "°": ("°", " degrees", "^\\circ"),
    "apple": (" apples", " apple"),
}
BEFORE = {"$": ("$", "$ ", "US$", "USD ", "\\$"), "€": ("€", "EUR "), "₹": ("₹", "Rs. "), "a$": ("A$", "AUD ")}
SCALES = {3: ("k", "K", " thousand", " k"), 6: (" million", "M", " mn", " million"), 9: (" billion", "bn", "B")}
WRAPS = ("{}", "**{}**", "`{}`", '"{}"', "'{}'", "__{}__", "\\boxed{{{}}}", "\\({}\\)", " {}. ", "*{}*.", "“{}”")

integers = st.one_of(st.integers(-1200, 1200), st.integers(-(10**12), 10**12), st.integers(-(10**60), 10**60))
decimals = st.tuples(integers, st.integers(0, 12)).map(lambda pair: Fraction(pair[0], 10 ** pair[1]))


def in_digits(value: Fraction, places: int) -> tuple[str, str]:
    """(whole, decimals) of a value that has at most `places` decimals."""
    scaled = abs(value) * 10**places
    assert scaled.denominator == 1
    digits = str(scaled.numerator).zfill(places + 1)
    return digits[: len(digits) - places], digits[len(digits) - places :]


def grouped(integer: str, separator: str, *, indian: bool) -> str:
    if len(integer) <= 3:
        return integer
    head, tail, size = integer[:-3], integer[-3:], 2 if indian else 3
    first = len(head) % size
    groups = [head[:first]] * (first > 0) + [head[i : i + size] for i in range(first, len(head), size)]
    return separator.join([*groups, tail])


@st.composite
def written(draw, values=decimals) -> tuple[str, Fraction, str]:
    """(a text, its value, its unit) in any form that the grammar has."""
    value = draw(values)
    places = next(places for places in range(80) if (value * 10**places).denominator == 1)
    scale = draw(st.sampled_from((0, 0, *SCALES)))
    shift = draw(st.sampled_from((0, 0, 0, -7, 3, 11)))  # of the exponent
    inner = value / Fraction(10) ** (scale + shift)
    places = next(places for places in range(places, 120) if (inner * 10**places).denominator == 1)
    places += draw(st.integers(0, 2))  # zeros that say nothing
    integer, fraction = in_digits(inner, places)
    integer = draw(st.sampled_from(("", "00"))) + integer if draw(st.booleans()) else grouped(
        integer, draw(st.sampled_from((",", "'", " ", "\u202f", "\u2009", "\u00a0"))), indian=False
    )  # fmt: skip
    if draw(st.booleans()) and integer.isdigit() and not integer.startswith("0"):
        integer = grouped(integer, ",", indian=True)
    number = integer + (f".{fraction}" if fraction or draw(st.booleans()) else "")
    if shift:
        number += draw(st.sampled_from(("e{}", "E{}", "×10^{}", " x 10^{{{}}}", " × 10^{}"))).format(shift)
    number += draw(st.sampled_from(SCALES[scale])) if scale else ""
    before = draw(st.booleans())
    unit = draw(st.sampled_from(sorted(BEFORE if before else UNITS)))
    sign = draw(st.sampled_from(("-", "\u2212", "minus ", "- "))) if value < 0 else draw(st.sampled_from(("", "", "+")))
    accounting = value < 0 and draw(st.booleans())
    mark = draw(st.sampled_from((BEFORE if before else UNITS)[unit]))
    body = mark + number if before else number + mark
    if scale and not before and mark[:1].isalpha():
        body = f"{number} {mark}"
    if accounting:
        text = f"({body})"
    elif before and draw(st.booleans()):
        text = mark + sign + number
    else:
        text = sign + body
    return draw(st.sampled_from(WRAPS)).format(text), value, unit


@settings(max_examples=300)
@given(written())
def test_every_form_gives_its_value_and_unit_back(form):
    text, value, unit = form
    quantity = quantity_of(text)
    assert quantity is not None, text
    assert (quantity.value, quantity.unit) == (value, unit), text
    assert quantity_of(str(quantity)) == quantity  # the one way to write it is such a form
    assert normalise(normalise(text, "number"), "number") == normalise(text, "number") == str(quantity)


near = st.sampled_from([Fraction(n, d) for n in (-36, -3, 0, 3, 30, 36, 3000) for d in (1, 10, 1000)])


@settings(max_examples=60)
@given(st.lists(written(near), min_size=3, max_size=5), written(near))
def test_equality_is_that_of_values_and_an_equivalence(forms, gold):
    accepted = AcceptedAnswers([gold[0]], "exact", "number")
    for text, value, unit in forms:
        unit_of_answer = unit or gold[2]
        equal = value == gold[1] and (gold[2] == "" or unit_of_answer == gold[2])
        assert accepted.accepts(accepted.key(text)) == equal, (text, gold)
        other = AcceptedAnswers([text], "exact", "number")  # symmetric
        assert other.accepts(other.key(gold[0])) == (value == gold[1] and (unit == "" or (gold[2] or unit) == unit))
    keys = [accepted.key(text) for text, _, _ in forms]
    for (_, form, u), a in zip(forms, keys, strict=True):
        for (_, two, v), b in zip(forms, keys, strict=True):
            same_unit = gold[2] == "" or (u or gold[2]) == (v or gold[2])
            assert (a == b) == (form == two and same_unit)


@given(st.text(alphabet="0123456789.,-+%$€ kKmM()eE/^×*_`\"'\\{}abt°⅓½²", max_size=12))
def test_any_text_has_one_key_and_its_key_has_the_same(text):
    key = normalise(text, "number")
    assert normalise(key, "number") == key
    quantity = quantity_of(text)
    assert quantity is None or quantity_of(key) == quantity


@pytest.mark.parametrize("digits", (MOST_DIGITS, MOST_DIGITS + 1))
def test_a_number_of_any_length_is_exact_up_to_the_limit_and_a_text_beyond(digits):
    long = "9" * digits
    assert (quantity_of(long) is not None) == (digits <= MOST_DIGITS)
    for text in (long, f"0.{long[1:]}"):
        accepted = AcceptedAnswers([text], "exact", "number")
        assert accepted.accepts(accepted.key(text))
        assert not accepted.accepts(accepted.key(text[:-1] + "8"))


def test_no_number_costs_more_than_its_length():
    for text in ("1e999", "1e-999", "1e9999999", "9e999999999", "10^999999", "1/" + "7" * 900, "1/" + "2" * 1999):
        quantity = quantity_of(text)
        assert quantity is None or len(str(quantity)) <= 2 * MOST_DIGITS


def test_each_plain_number_is_its_own_class():
    """As GSM8K's 8,792 golds are: whole numbers of up to nine digits, some with a minus."""
    golds = [*map(str, range(-50, 120)), "1000", "1200", "10000", "70000", "109200000", "192000000"]
    assert len(golds) == len({normalise(gold, "number") for gold in golds})
    for gold in golds:
        accepted = AcceptedAnswers([gold], "exact", "number")
        assert [other for other in golds if accepted.accepts(accepted.key(other))] == [gold]
