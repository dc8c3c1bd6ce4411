"""Examples: fixed id boundaries, and what happens to pairs that do not fit."""

import pytest

from megatron_jq.data.dataset import train_tokenizer
from megatron_jq.data.prompts import EncodedExamples, Placed, PromptWriter, select_fitting
from megatron_jq.data.template import PromptStyle
from megatron_jq.errors import UserError
from megatron_jq.formats.pair import Pair
from megatron_jq.records import Example
from tests.unit.pairs import load_pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer("builtin:recall", [], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def encode_examples(pairs, tokenizer, **limits) -> EncodedExamples:
    """Every pair as it stands, without a template, and then what fits of them."""
    writer = PromptWriter(PromptStyle(), tokenizer)
    placed = [Placed(writer.example(index, one), one.place) for index, one in enumerate(pairs)]
    return select_fitting(placed, **limits)


def pair(words: int, answer_words: int, line: int) -> Pair:
    return Pair(" ".join(["green"] * words), " ".join(["kite"] * answer_words), f"data.jsonl:{line}")


def test_prompt_ids_end_with_think_and_answer_ids_with_the_end_of_text(tokenizer):
    pairs = load_pairs("builtin:recall", count=20)
    encoded = encode_examples(pairs, tokenizer, max_prompt_tokens=7)
    for index, (example, source) in enumerate(zip(encoded.examples, pairs, strict=True)):
        assert example == Example(
            index,
            source.prompt,
            source.answer,
            (*tokenizer.encode(source.prompt), tokenizer.think_open_id),
            (*tokenizer.encode(source.answer), tokenizer.eos_id),
        )
        assert tokenizer.decode(example.answer_ids) == source.answer
        assert tokenizer.decode(example.prompt_ids) == source.prompt
    assert (encoded.overlong.count, encoded.overlong.total, encoded.overlong.first) == (0, 20, ())


def test_a_prompt_fits_when_it_and_think_come_to_the_limit(tokenizer):
    assert len(encode_examples([pair(4, 1, 1)], tokenizer, max_prompt_tokens=5).examples[0].prompt_ids) == 5
    with pytest.raises(UserError, match=r"1 of 1 examples exceed 4 prompt tokens: data.jsonl:1 \(5 prompt tokens\)"):
        encode_examples([pair(4, 1, 1)], tokenizer, max_prompt_tokens=4)


def test_an_answer_fits_when_it_and_the_end_of_text_come_to_the_budget(tokenizer):
    assert encode_examples([pair(1, 3, 1)], tokenizer, max_prompt_tokens=9, answer_budget=4).overlong.count == 0
    with pytest.raises(
        UserError, match=r"exceed 9 prompt tokens and 3 answer tokens: data.jsonl:1 \(4 answer tokens\)"
    ):
        encode_examples([pair(1, 3, 1)], tokenizer, max_prompt_tokens=9, answer_budget=3)


def test_overlong_pairs_are_counted_the_first_three_named_and_the_cure_given(tokenizer):
    pairs = [pair(words, 1, line) for line, words in enumerate([1, 9, 2, 8, 7, 6, 3], start=1)]
    with pytest.raises(UserError) as error:
        encode_examples(pairs, tokenizer, max_prompt_tokens=5)
    message = str(error.value)
    assert message.startswith("4 of 7 examples exceed 5 prompt tokens: ")
    named = "data.jsonl:2 (10 prompt tokens), data.jsonl:4 (9 prompt tokens), data.jsonl:5 (8 prompt tokens), …"
    assert named in message and "data.jsonl:6" not in message
    assert "--overlong-prompts drop" in message


def test_dropped_pairs_are_reported_and_the_others_keep_their_rows(tokenizer):
    pairs = [pair(words, 1, line) for line, words in enumerate([1, 9, 2], start=1)]
    encoded = encode_examples(pairs, tokenizer, max_prompt_tokens=5, overlong="drop")
    assert [example.index for example in encoded.examples] == [0, 2]
    assert (encoded.overlong.count, encoded.overlong.total) == (1, 3)
    assert encoded.overlong.first == ("data.jsonl:2 (10 prompt tokens)",)


def test_dropping_everything_is_refused_without_advice_to_drop(tokenizer):
    with pytest.raises(UserError, match="2 of 2 examples exceed 3 prompt tokens") as error:
        encode_examples([pair(9, 1, 1), pair(9, 1, 2)], tokenizer, max_prompt_tokens=3, overlong="drop")
    assert "--overlong-prompts" not in str(error.value)


def test_text_that_the_tokenizer_cannot_read_is_refused_with_its_line(tokenizer):
    with pytest.raises(UserError, match="^data.jsonl:8: the tokenizer has no piece for 'zebra'"):
        encode_examples([Pair("green zebra .", "kite", "data.jsonl:8")], tokenizer, max_prompt_tokens=9)


def test_an_unknown_policy_is_refused(tokenizer):
    with pytest.raises(UserError, match="--overlong-prompts skip is not known; it is one of error, drop"):
        encode_examples([], tokenizer, max_prompt_tokens=9, overlong="skip")
