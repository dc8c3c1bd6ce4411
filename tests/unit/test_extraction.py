"""The answer inside a sampled text, by each way; what holds none has the empty answer; balanced braces, any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.data.answers import normalise
from megatron_jq.data.extraction import EXTRACTIONS, extract
from megatron_jq.evaluate.judging import Answer, Judge, Metric, judge_prompt
from megatron_jq.settings import TrainingConfig

#: (way, text, the answer in it)
CASES = (
    ("none", " so 5 ", " so 5 "),
    ("last-number", "so 5 + 3 = 8.", "8"),
    ("last-number", "It cost $1,080.50 in all", "$1,080.50"),
    ("last-number", "That makes 70k people, or 12.5 % of them.", "12.5 %"),
    ("last-number", "from -3 to \u22125e-3", "-5e-3"),
    ("last-number", "**18 apples**", "18 apples"),
    ("last-number", "v1.2 on 2024/05/01", ""),
    ("last-number", "no number", ""),
    ("boxed", r"thus \boxed{1} and $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
    ("boxed", r"first \boxed{3}, then \boxed{4", "3"),
    ("boxed", r"\fbox{ 7 }", "7"),
    ("boxed", "boxed 7", ""),
    ("answer-is", "The answer is 42.", "42"),
    ("answer-is", "the answer is 41. No: the Answer is: **42**.\nBye 43.", "42"),
    ("answer-is", "**The answer is 42.**", "42"),
    ("answer-is", "Answer:\n\n  Marie Curie\n", "Marie Curie"),
    ("answer-is", "**Answer:** 3.5", "3.5"),
    ("answer-is", "so 42", ""),
)


@pytest.mark.parametrize(("how", "text", "answer"), CASES)
def test_the_answer_in_a_text(how, text, answer):
    assert extract(text, how) == answer


def test_the_setting_has_every_way():
    assert TrainingConfig.__dataclass_fields__["answer_extract"].default == "none"
    assert set(EXTRACTIONS) == set(TrainingConfig.__annotations__["answer_extract"].__args__)


inside = st.recursive(
    st.sampled_from(["1", "x", "\\frac", " "]), lambda part: st.lists(part).map(lambda p: "{" + "".join(p) + "}")
)


@settings(max_examples=40)
@given(
    st.text(alphabet="ab{}\\ 1", max_size=9),
    st.lists(inside, min_size=1, max_size=5).map("".join),
    st.text("ab 1}", max_size=9),
)
def test_a_box_with_balanced_braces_gives_its_content(before, content, after):
    assert extract(f"{before} \\boxed{{{content}}}{after}", "boxed") == content.strip()


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_has_an_answer_that_is_a_part_of_it(text):
    for how in EXTRACTIONS[1:]:
        answer = extract(text, how)
        assert how == "last-number" or answer in text
    number = extract(text, "last-number")
    assert number == "" or normalise(number, "number") != ""


def test_it_comes_before_the_judge_and_a_text_without_an_answer_is_wrong():
    texts = [r"2+2 is \boxed{4}", "4", r"\boxed{4.0} or so", r"\boxed{5}"]
    judged = judge_prompt([Answer(text, True) for text in texts], ["4"], Judge("exact", "number", "boxed"))
    assert judged.right == (True, False, True, False) and judged.value(Metric("maj", 4)) == 1
    assert judge_prompt([Answer(texts[0], False)], ["4"], Judge("exact", "number", "boxed")).right == (False,)
