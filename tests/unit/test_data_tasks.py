"""The built-in tasks: splits never meet, a seed fixes the items, and each word is one token."""

import pytest

from megatron_jq.data.dataset import train_tokenizer
from megatron_jq.data.tasks import BUILTIN_KINDS, builtin_examples, builtin_texts
from megatron_jq.errors import UserError
from tests.unit.pairs import load_pairs

kinds = pytest.mark.parametrize("kind", BUILTIN_KINDS)


@kinds
def test_held_out_items_of_any_seed_are_absent_from_training_data_of_any_other(kind):
    heldout = {item for seed in range(3) for item in builtin_examples(kind, "heldout", 200, seed)}
    train = {item for seed in range(3) for item in builtin_examples(kind, "train", 2000, seed)}
    assert heldout.isdisjoint(train)
    assert {prompt for prompt, _ in heldout}.isdisjoint(prompt for prompt, _ in train)


@kinds
def test_items_are_distinct_and_a_smaller_count_is_a_prefix_of_a_larger(kind):
    items = builtin_examples(kind, "train", 500, seed=3)
    assert len({prompt for prompt, _ in items}) == 500
    assert builtin_examples(kind, "train", 40, seed=3) == items[:40]
    assert builtin_examples(kind, "train", 40, seed=4) != items[:40]


def test_items_of_a_seed_are_these_on_every_machine_and_python():
    assert builtin_examples("recall", "train", 2, seed=0) == [
        ("Petra brings a black ladder .", "the ladder of Petra is black today ."),
        ("Omar brings a grey kettle .", "the kettle of Omar is grey today ."),
    ]
    assert builtin_examples("reorder", "heldout", 1, seed=0) == [
        (
            "Lena brings a green ladder and Mira brings a pink whistle .",
            "Mira holds the pink whistle and Lena holds the green ladder .",
        ),
    ]
    assert builtin_examples("sum", "train", 1, seed=7) == [
        ("Farid has four grapes and Elsa has zero .", "Farid and Elsa have four grapes together ."),
    ]


def test_recall_answers_with_the_words_of_its_prompt():
    for prompt, answer in builtin_examples("recall", "heldout", 50, seed=1):
        name, _, _, colour, thing, _ = prompt.split()
        assert answer == f"the {thing} of {name} is {colour} today ."


def test_reorder_names_the_second_person_first_and_nothing_twice():
    for prompt, answer in builtin_examples("reorder", "train", 50, seed=1):
        first, second = (clause.split() for clause in prompt.removesuffix(" .").split(" and "))
        assert answer == (
            f"{second[0]} holds the {second[3]} {second[4]} and {first[0]} holds the {first[3]} {first[4]} ."
        )
        assert all(one != other for one, other in zip(first[::3], second[::3], strict=True)) and first[4] != second[4]


def test_sums_are_right_and_every_pair_of_numbers_is_trained_on():
    value = {word: number for number, word in enumerate("zero one two three four five six seven eight".split())}
    pairs_of_numbers = set()
    for prompt, answer in builtin_examples("sum", "train", 1024, seed=0):
        words = prompt.split()
        pairs_of_numbers.add((words[2], words[7]))
        assert value[answer.split()[4]] == value[words[2]] + value[words[7]]
    assert len(pairs_of_numbers) == 25


@kinds
def test_every_word_of_both_splits_is_one_piece_of_a_small_vocabulary(kind, tmp_path):
    tokenizer = train_tokenizer(f"builtin:{kind}", [], tmp_path / "tokenizer.model")
    assert 50 <= tokenizer.vocab_size <= 70
    for split in ("train", "heldout"):
        for prompt, answer in builtin_examples(kind, split, 800, seed=11):
            for text in (prompt, answer):
                ids = tokenizer.encode(text)
                assert len(ids) == len(text.split())
                assert tokenizer.decode(ids) == text


@kinds
def test_texts_for_the_tokenizer_hold_every_word_that_the_kind_can_say(kind):
    said = {word for text in builtin_texts(kind) for word in text.split()}
    drawn = builtin_examples(kind, "train", 2000, seed=5) + builtin_examples(kind, "heldout", 500, seed=5)
    assert {word for pair in drawn for text in pair for word in text.split()} == said


@kinds
def test_a_row_with_its_rationale_stays_near_thirty_tokens(kind):
    """Prompt, <think>, six sampled tokens, </think>, answer, end of text."""
    longest = max(len(p.split()) + len(a.split()) for p, a in builtin_examples(kind, "train", 100, seed=0))
    assert longest + 1 + 6 + 1 + 1 <= 34


def test_every_combination_is_in_exactly_one_split():
    """16 names x 16 colours x 16 things; one more than a split holds is refused, and the message says how many."""
    with pytest.raises(UserError, match=r"builtin:recall has (\d+) heldout examples, 4096 were asked") as heldout:
        builtin_examples("recall", "heldout", 4096, seed=0)
    with pytest.raises(UserError, match=r"builtin:recall has (\d+) train examples") as train:
        builtin_examples("recall", "train", 4096, seed=0)
    sizes = [int(str(error.value).split(" has ")[1].split()[0]) for error in (heldout, train)]
    assert sum(sizes) == 16**3
    assert 0.15 < sizes[0] / 16**3 < 0.25


def test_unknown_kind_split_and_count_are_refused_by_name():
    with pytest.raises(UserError, match="builtin:recal is not a built-in task; did you mean builtin:recall"):
        load_pairs("builtin:recal")
    with pytest.raises(UserError, match="split 'held' is not known"):
        builtin_examples("recall", "held", 1, seed=0)
    with pytest.raises(UserError, match="was asked for 0 examples"):
        builtin_examples("recall", "train", 0, seed=0)
