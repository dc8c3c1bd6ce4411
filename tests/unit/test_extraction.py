"""The answer inside a sampled text, by each way; what holds none has the empty answer; balanced braces, any text."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_jq.data.answers import AcceptedAnswers, normalise
from megatron_jq.data.extraction import EXTRACTIONS, extract
from megatron_jq.evaluate.judging import Answer, Judge, Metric, judge_prompt
from megatron_jq.settings import TrainingConfig
from tests.unit.test_numbers import written

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
    ("last-number", "**Answer:18**", "18"),
    ("last-number", "####18", "18"),
    ("last-number", "so $m = 18$ kg.", "18 kg"),
    ("last-number", "<answer>(about 18 apples)</answer>", "18 apples"),
    ("last-number", "5 times it came to 18, says CO2 of GPT-4", "18"),
    ("last-number", "5 - as we saw", "5"),
    ("last-number", "3 x 4 = 12 apples", "12 apples"),
    ("boxed", r"thus \boxed{1} and $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
    ("boxed", r"first \boxed{3}, then \boxed{4", "3"),
    ("boxed", r"\fbox{ 7 }", "7"),
    ("boxed", "boxed 7", ""),
    ("answer-is", "The answer is 42.", "42"),
    ("answer-is", "the answer is 41. No: the Answer is: **42**.\nBye 43.", "42"),
    ("answer-is", "**The answer is 42.** Yes.", "42"),
    ("answer-is", "The answer is 18. It is right.", "18"),
    ("answer-is", "Final Answer: The final answer is $18$. I hope it is correct.", "$18$"),
    ("answer-is", "The answer is 3.5. ok", "3.5"),
    ("answer-is", "The answer is $18. Explanation: 9*2", "$18"),
    ("answer-is", "the answer is therefore 18", "18"),
    ("answer-is", "The answer is: 18!", "18"),
    ("answer-is", "the answer is So Big; yes", "So Big"),
    ("answer-is", "The answer is John F. Kennedy. He", "John F. Kennedy"),
    ("answer-is", "The answer is J. K. Rowling.", "J. K. Rowling"),
    ("answer-is", "The answer is A. Because", "A"),
    ("answer-is", "The answer is Rs. 500.", "Rs. 500"),
    ("answer-is", "Answer:\n\n  Marie Curie\n", "Marie Curie"),
    ("answer-is", "**Answer:** 3.5", "3.5"),
    ("answer-is", "so 42", ""),
)


#: A text's last number → its value; "" where all that could be read is a piece of another value.
WHOLE_NUMBERS = {
    r"so the total is $5{,}500$": "5500", r"is $\frac{3}{4}$": "0.75", "it takes 2 1/2 hours": "2.5",
    "so 2½ hours.": "2.5", r"it is 5 \times 10^3": "5000", r"it is 5 \times 10^{3}": "5000", r"$5\times10^3$": "5000",
    "so 10^2": "100", "1{,}000": "1000", r"1\,234": "1234", r"1\;234": "1234", "1~234": "1234", "it's 1/2": "0.5",
    "3/4, then": "0.75", "is x^5": "", "so 5 squared": "", "on 2018-12-18": "", "from GPT-4": "", "5-6": "",
    "5 - 6": "", "5 + 6": "", "5 times 6": "", "2 to the power of 3": "", "5 × n": "", "5 π": "", "2 and a half": "",
    "2x5": "", "10:30": "", "f(5)": "", r"$\frac{1}{2}x$": "", "1,2345": "", "3.1.4": "", "n-1": "",
}  # fmt: skip


@pytest.mark.parametrize("text", WHOLE_NUMBERS)
def test_a_number_is_taken_whole_or_not_at_all(text):
    number = extract(text, "last-number")
    assert number == WHOLE_NUMBERS[text] == "" or AcceptedAnswers([WHOLE_NUMBERS[text]], "exact", "number").accepts(
        AcceptedAnswers([WHOLE_NUMBERS[text]], "exact", "number").key(number)
    )


@settings(max_examples=300)
@given(written(), st.sampled_from(("it is {}.", "{}", "so, of 7 in all: {}", "It is {}, I think.", "x = {}")))
def test_every_form_of_the_number_rule_is_the_last_number_of_a_sentence(form, sentence):
    assume(not re.search(r"[0-9]\.\s", form[0].strip()))  # "5. kg" ends a sentence there
    assert normalise(extract(sentence.format(form[0]), "last-number"), "number") == normalise(form[0], "number")


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
