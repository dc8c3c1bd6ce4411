"""Exact match and F1 of HotPotQA and MuSiQue: values worked out by hand from their scripts' definition, and bounds."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.evaluate.judging import Interval, Judge
from megatron_jq.evaluate.official import FORMATS, scores
from megatron_jq.evaluate.report import results_of, table
from tests.unit.test_evaluation import HEADER, PROMPTS, replace

#: (answer, gold answers, data format, exact match, F1)
CASES = (
    ("The Beatles!", ["Beatles"], "hotpotqa", 1, 1),
    ("the band Beatles", ["Beatles"], "hotpotqa", 0, 2 / 3),  # 1 of 2 words, 1 of 1
    ("New York City", ["York New"], "hotpotqa", 0, 0.8),  # the order says nothing: 2 of 3, 2 of 2
    ("a b b c", ["b b d"], "hotpotqa", 0, 2 / 3),  # "a" is an article; 2 of 3, 2 of 3
    ("Paris", ["London"], "hotpotqa", 0, 0),
    ("yes", ["yes"], "hotpotqa", 1, 1),
    ("yes it is", ["yes"], "hotpotqa", 0, 0),
    ("yes", ["yes it is"], "hotpotqa", 0, 0),
    ("no", ["no one"], "hotpotqa", 0, 0),
    ("no answer", ["noanswer"], "hotpotqa", 0, 0),
    ("", ["Paris"], "hotpotqa", 0, 0),
    ("the", ["a"], "hotpotqa", 1, 0),  # as its script has it: two texts without a word are equal, and share none
    ("yes it is", ["yes"], "musique", 0, 0.5),
    ("no", ["no one"], "musique", 0, 2 / 3),
    ("JFK", ["John F. Kennedy", "J.F.K."], "musique", 1, 1),
    ("Kennedy", ["John F. Kennedy", "JFK"], "musique", 0, 0.5),
    ("the", ["a"], "musique", 1, 1),
    ("", ["Paris"], "musique", 0, 0),
)


@pytest.mark.parametrize(("answer", "golds", "data_format", "exact", "f1"), CASES)
def test_values_worked_out_by_hand(answer, golds, data_format, exact, f1):
    assert scores(answer, golds, data_format) == (exact, pytest.approx(f1, rel=1e-15))


words = st.lists(st.sampled_from(["red", "Blue", "the", "yes", "no", "1,5", "-"]), max_size=5).map(" ".join)


@given(words, st.lists(words, min_size=1, max_size=3))
def test_f1_lies_between_exact_match_and_1_and_counts_shared_words(answer, golds):
    for data_format in FORMATS:
        exact, f1 = scores(answer, golds, data_format)
        assert 0 <= f1 <= 1 and exact in (0, 1)
        assert scores(answer, golds[:1], data_format)[1] <= f1  # an alias never takes away
        assert scores(golds[0], [answer], data_format) == scores(answer, golds[:1], data_format)
    exact, f1 = scores(answer, golds[:1], "musique")
    said, gold = (
        Counter(w for w in t.lower().replace("1,5", "15").split() if w not in ("the", "-")) for t in (answer, golds[0])
    )
    assert exact == (list(said.elements()) == list(gold.elements()) and f1 == 1 or exact) or exact == 0
    if said and gold:  # Dice's coefficient of the two bags
        assert f1 == pytest.approx(2 * (said & gold).total() / (said.total() + gold.total()))


@pytest.mark.parametrize("data_format", FORMATS)
def test_an_evaluation_reports_both_with_their_intervals(data_format):
    header = replace(HEADER, data_format=data_format, rule="squad")
    results = results_of(header, PROMPTS, Judge("exact", "squad"), (), Interval(500, 0.9, 1))
    each = [[scores(s.answer, s.golds, data_format) for s in samples] for samples in PROMPTS]
    for place, name in enumerate(("em", "f1")):
        mean = sum(sum(pair[place] for pair in pairs) / len(pairs) for pairs in each) / len(each)
        figure = results.metrics[name]
        assert figure.value == pytest.approx(mean) and figure.low <= mean <= figure.high
        assert f"\n{name} " in table(results)
    assert 0 < results.metrics["em"].value < results.metrics["f1"].value < 1
    assert "f1" not in results_of(HEADER, PROMPTS, Judge(), (), Interval(10)).metrics
