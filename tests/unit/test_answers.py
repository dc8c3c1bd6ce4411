"""Answers are the same or not: hand-made cases for each rule; rules are fast on hostile text."""

import time

import pytest

from megatron_jq.data.answers import RULES, AcceptedAnswers, normalise, rule_of
from megatron_jq.errors import UserError
from megatron_jq.evaluate.judging import Answer, judge_of
from megatron_jq.settings import TrainingConfig


def right(answer: str, golds: list[str], match: str, rule: str) -> bool:
    accepted = AcceptedAnswers(golds, match, rule)
    return accepted.accepts(accepted.key(answer))


#: (answer, gold, the rules under which it is an exact match)
CASES = (
    # blanks and casing
    (" 42\n", "42", "none text squad number"),
    ("Paris", "paris", "text squad number"),
    ("New  York\tCity", "New York City", "text squad number"),
    ("STRASSE", "straße", "text squad number"),
    ("Paris.", "Paris", "text squad number"),
    ("Paris", "London", ""),
    # Unicode: composed and decomposed, full width, no-break space, dashes, quotes, ligature, Kelvin
    ("Cafe\u0301", "Caf\u00e9", "text squad number"),
    ("１２", "12", "text squad number"),
    ("New\u00a0York", "New York", "text squad number"),
    ("\u22125", "-5", "text squad number"),
    ("O’Hara", "O'Hara", "text squad number"),
    ("o\ufb03ce", "office", "text squad number"),
    ("Café", "Cafe", ""),
    # what NFKC would run together
    ("10²", "102", ""),
    ("3½", "31/2", ""),
    ("½", "1/2", "text squad number"),
    # articles and punctuation
    ("The Beatles!", "Beatles", "squad"),
    ("an apple", "apple", "squad"),
    ("U.S.", "US", "squad"),
    ("theme", "me", ""),
    # thousands separators
    ("1,080", "1080", "squad number"),
    ("1,234,567.00", "1234567", "number"),
    ("1 080", "1080", "number"),
    ("1\u202f080", "1080", "number"),
    ("1,08", "108", "squad"),
    ("1,0800", "10800", "squad"),
    # zeros and signs that say nothing
    ("0.50", "0.5", "number"),
    ("42.0", "42", "number"),
    (".5", "0.5", "number"),
    ("+5", "5", "squad number"),
    ("-0.0", "0", "number"),
    ("007", "7", "number"),
    ("-5", "5", "squad"),
    ("12.34567890123456789012345678901234567890", "12.34567890123456789012345678901234567891", ""),
    # percent
    ("12%", "12", "squad number"),
    ("12.5 percent", "12.5%", "number"),
    ("12 per cent", "12 %", "number"),
    ("12%", "0.12", ""),
    ("12%", "12 kg", ""),
    # currencies
    ("$1,080.50", "1080.5", "number"),
    ("-$5", "$-5", "squad number"),
    ("5 dollars", "$5", "number"),
    ("USD 5", "US$5", "number"),
    ("$5", "€5", ""),
    ("$12 million", "12 million dollars", "number"),
    # units: passed over where one answer has none, told apart where both have one
    ("5 kg", "5", "number"),
    ("5", "5kg", "number"),
    ("5 apples.", "5", "number"),
    ("30 °C", "30", "number"),
    ("5 km/h", "5", "number"),
    ("5 kg", "5 g", ""),
    ("5 kilograms", "5 kg", "number"),
    ("60 kilometers per hour", "60 km/h", "number"),
    ("5 square feet", "5 ft²", "number"),
    ("90°", "90", "number"),
    ("12 million", "12", ""),
    ("12 million", "12 thousand", ""),
    ("5th", "5", ""),
    ("3 of 5", "3", ""),
    ("2 or three", "2", ""),
    # no quantities
    ("1999-2000", "1999", ""),
    ("10:30", "10", ""),
    ("1/2", "1", ""),
    ("1/2", "0.5", "number"),
    ("2 1/2", "2.5", "number"),
    ("2½", "2.5", "number"),
    ("1/3", "0.3333333333333333", ""),
    ("v1.20", "v1.2", ""),
    ("section 1.20", "section 1.2", ""),
    ("1e3", "1", ""),
    ("5th", "5", ""),
    ("1990s", "1990", ""),
    ("5 squared", "5", ""),
    ("5²", "5", ""),
    ("2π", "2", ""),
    ("5 is incorrect", "5", ""),
    ("5 or so", "5", ""),
    ("+-5", "5", "squad"),
    ("1/0", "1/0.0", ""),
    # magnitudes
    ("70k", "70", ""),
    ("70k", "70,000", "number"),
    ("5M", "5", ""),
    ("$5M", "5000000", "number"),
    ("$5m", "5 million dollars", "number"),
    ("5 m", "5 meters", "number"),
    ("3 dozen", "3", ""),
    ("3 dozen eggs", "36", "number"),
    ("2 lakh", "2,00,000", "number"),
    ("five", "5", ""),
    # exponents
    ("5e-3", "5", ""),
    ("5e-3", "0.005", "number"),
    ("1e-05", "0.00001", "number"),
    ("1e-05", "1", ""),
    ("5×10^3", "5000", "number"),
    ("5 × 10⁻³", "0.005", "number"),
    ("10²", "100", "number"),
    # basis points are hundredths of a percent
    ("5 bps", "5", ""),
    ("5 bps", "0.05%", "number"),
    ("5 bps", "0.05", ""),
    ("5 bps", "0.0005", "number"),
    ("(5 bps)", "-0.0005", "number"),
    ("5 per mille", "0.5", ""),
    ("20%", "20", "squad number"),
    ("9.3%", "0.093", ""),
    # no million, nothing to see, punctuation
    ("1 k k", "1000000", ""),
    ("\ufeff18\u200b", "18", "text squad number"),
    ("= 18", "18", "squad number"),
    ("18,", "18", "squad number"),
    ("18;", "18", "squad number"),
    ("18!", "18", "squad number"),
    # other currencies, before and after
    ("50¢", "50", "number"),
    ("50 cents", "50¢", "number"),
    ("₹500", "500", "number"),
    ("₹5,00,000", "500000 rupees", "number"),
    ("A$5", "5", "number"),
    ("A$5", "US$5", ""),
    ("$5", "$5 USD", "number"),
    ("\\$29", "29", "squad number"),
    # around it: Markdown, quotes, mathematics
    ("**29**", "29", "squad number"),
    ("__29__", "29", "squad number"),
    ("`29`", "29", "squad number"),
    ('"29."', "29", "squad number"),
    ("**$29**.", "29", "squad number"),
    ("\\boxed{29}", "29", "number"),
    ("$29$", "29", "squad number"),
    ("$\\boxed{\\$1{,}080}$", "1080", "number"),
    ("\\frac{1}{2}", "0.5", "number"),
    ("18\\text{ inches}", "18", "number"),
    ("**Yes**", "yes", "squad number"),
    # accounting's parentheses are a minus
    ("(1,234)", "-1234", "squad number"),
    ("(1,234)", "1234", "squad"),
    ("$(1.2) million", "-1200000", "number"),
    ("(5%)", "-5", "squad number"),
    # grouping
    ("1'080", "1080", "squad number"),
    ("1\u2009080", "1080", "number"),
    ("1,00,000", "100000", "squad number"),
    ("1.080,00", "1080", ""),
    ("1,08", "1.08", "squad"),
    ("yes", "Yes", "text squad number"),
)


@pytest.mark.parametrize(("answer", "gold", "rules"), CASES, ids=[f"{a!r} {g!r}" for a, g, _ in CASES])
def test_exact_match_by_every_rule(answer, gold, rules):
    assert [rule for rule in RULES if right(answer, [gold], "exact", rule)] == rules.split()


#: (answer, gold, rule, whether the gold one is part of it)
PARTS = (
    ("the answer is 42 .", "42", "none", True),
    ("the answer is Forty", "forty", "none", False),
    ("the answer is Forty", "forty", "text", True),
    ("it was The Beatles, of course", "Beatles", "squad", True),
    ("it came to $1,080.50 in all", "1080.5", "number", True),
    ("that is 12.50 percent more", "12.5%", "number", True),
    ("that is 12.5 more", "13.5", "number", False),
    ("42", "421", "none", False),
    ("5 kg", "5", "number", True),
)


@pytest.mark.parametrize(("answer", "gold", "rule", "expected"), PARTS)
def test_substring_match(answer, gold, rule, expected):
    assert right(answer, [gold], "substring", rule) == expected


def test_any_of_several_gold_answers_will_do_and_an_empty_one_is_no_part_of_all():
    assert right("b", ["a", "b"], "exact", "none") and not right("c", ["a", "b"], "exact", "none")
    assert not right("anything", [""], "substring", "none") and right("", [""], "substring", "none")
    for rule in RULES:
        assert normalise(" The ", rule) and normalise("%", rule)  # something to compare is left


def test_the_rule_follows_the_data_set_unless_it_is_named():
    rules = [rule_of("auto", kind) for kind in ("finqa", "gsm8k", "hotpotqa", "musique", "jsonl", "builtin")]
    assert rules == ["number", "number", "squad", "squad", "none", "none"]
    with pytest.raises(UserError, match="--data-format nothing is not known"):
        rule_of("auto", "nothing")
    assert rule_of("text", "gsm8k") == "text"
    with pytest.raises(UserError, match="--match-rule numbers is not known; did you mean number"):
        rule_of("numbers", "gsm8k")


def test_where_golds_are_ratios_a_percentage_is_no_number_without_its_sign():
    for data_format, equal in (("finqa", False), ("gsm8k", True), ("jsonl", True)):
        judge = judge_of(TrainingConfig(match_rule="number"), data_format)
        for text, gold in (("0.093%", "0.093"), ("0.5 percent", "0.5")):
            assert judge.is_right(Answer(text, True), [gold]) == equal
        assert judge.is_right(Answer("9.3", True), ["9.3%"]) and not judge.is_right(Answer("5 bps", True), ["0.05"])


def test_a_normalised_answer_is_normal():
    for text in {text for answer, gold, _ in CASES for text in (answer, gold)}:
        for rule in RULES:
            once = normalise(text, rule)
            assert normalise(once, rule) == once, (text, rule)


@pytest.mark.parametrize(
    "text",
    [
        *("1," * 20_000, "1 " * 8_000, "$" * 20_000, "9" * 20_000, "a b" * 10_000, "1,000" * 5_000, "1,000," * 5_000),
        *("1e5 " * 4_000, "5 x " * 4_000, "5 million " * 1_500, "minus " * 4_000, "(" * 20_000, "*" * 20_000),
    ],
    ids=lambda text: text[:8],
)
def test_hostile_text_takes_no_longer_than_its_length(text):
    began = time.process_time()
    for rule in RULES:
        assert not right(text, ["5"], "exact", rule)
        right(text, ["gold"], "substring", rule)
    assert time.process_time() - began < 10  # what grows with the square of the length takes a minute
