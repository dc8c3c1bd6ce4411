"""JSON-lines and GSM8K files: what is read, and for every fault the file and line that the message names."""

import json
import os

import pytest

from megatron_jq.config import parse_args
from megatron_jq.data.dataset import ReadOptions, load_source
from megatron_jq.data.reading import number_of, read_source
from megatron_jq.errors import UserError
from megatron_jq.formats.gsm8k import gold_answer
from megatron_jq.formats.pair import Pair
from tests.unit.pairs import load_pairs

GOOD = b'{"prompt": "two and two", "answer": "four"}\n'


def write(tmp_path, content: bytes):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return path


def test_pairs_come_in_order_with_their_lines(tmp_path):
    path = write(tmp_path, GOOD + b"\n  \n" + b'{"answer": "b", "prompt": "a", "id": null}')
    assert load_pairs(str(path), data_format="jsonl") == [
        Pair("two and two", "four", f"{path}:1"),
        Pair("a", "b", f"{path}:4"),
    ]


def test_fields_are_chosen_by_name(tmp_path):
    path = write(tmp_path, b'{"x": "a", "y": "b", "answer": "c"}\n')
    options = ReadOptions("jsonl", prompt_field="x", answer_field="y")
    assert load_source(str(path), options).pairs[0].answer == "b"


@pytest.mark.parametrize("number", ["3", "-0.10", "1e3", "109200000", "12345678901234567890123.5000", "9" * 5000])
def test_a_number_is_its_text_in_the_file(tmp_path, number):
    path = write(tmp_path, b'{"prompt": "n", "answer": %s}\n' % number.encode())
    (pair,) = load_pairs(str(path), data_format="jsonl")
    assert pair.answer == number and type(pair.answer) is str


def test_windows_line_ends_a_byte_order_mark_and_line_separators_inside_strings_are_read(tmp_path):
    text = json.dumps({"prompt": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False)
    path = write(tmp_path, b"\xef\xbb\xbf" + text.encode() + b"\r\n" + GOOD)
    assert [(p.prompt, p.place) for p in load_pairs(str(path), data_format="jsonl")] == [
        ("a\u2028b\x85c", f"{path}:1"),
        ("two and two", f"{path}:2"),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"prompt": "a", "answer": "b"', "not JSON at column 30"),
        (b"prompt: a", "not JSON at column 1"),
        (b'["a", "b"]', "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "answer": "\xff"}', "byte 28 of the line is not UTF-8"),
        (b'{"prompt": "a", "anwser": "b"}', "no field 'answer'; did you mean anwser"),
        (b'{"answer": "b"}', "no field 'prompt'"),
        (b"{}", "no field 'prompt'; the line has no field at all"),
        (b'{"prompt": "a", "answer": ""}', "field 'answer' is empty"),
        (b'{"prompt": " \\n", "answer": "b"}', "field 'prompt' is empty"),
        (b'{"prompt": "a", "answer": null}', "field 'answer' is null"),
        (b'{"prompt": "a", "answer": true}', "field 'answer' is a boolean"),
        (b'{"prompt": ["a"], "answer": "b"}', "field 'prompt' is a list"),
        (b'{"prompt": "a", "answer": {"text": "b"}}', "field 'answer' is an object"),
        (b'{"prompt": "a", "answer": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "answer": "\\ud83d"}', "field 'answer' holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_line(tmp_path, line, fault):
    path = write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        load_pairs(str(path), data_format="jsonl")
    assert str(error.value).startswith(f"{path}:3: ")
    assert fault in str(error.value)


def test_a_missing_or_unreadable_file_is_refused_with_the_option_that_named_it(tmp_path):
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(UserError, match=f"^--train-data {missing}: No such file"):
        load_pairs(str(missing))
    with pytest.raises(UserError, match=f"^--eval-data {tmp_path}: Is a directory"):
        load_pairs(str(tmp_path), flag="--eval-data", data_format="jsonl")


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    for data_format in ("auto", "jsonl", "gsm8k"):
        with pytest.raises(UserError, match=f"^--train-data {path} is empty"):
            load_pairs(str(path), data_format=data_format)


def gsm8k_line(question: str, answer: str) -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode() + b"\n"


SOLVED = gsm8k_line("How many clips?", "She sold 48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>72.\n#### 72")


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("work\n#### 72", "72"),
        ("#### 1,080", "1080"),
        ("x\n#### 109,200,000 ", "109200000"),
        ("x\n#### -5", "-5"),
        ("x\n####3.50\n", "3.50"),
        ("a #### b\n#### 7", "7"),
        ("#### yes, both", "yes, both"),
    ],
)
def test_the_gold_follows_the_mark_and_loses_its_grouping_commas(solution, gold):
    assert gold_answer(solution, "here") == gold


@pytest.mark.parametrize(("solution", "fault"), [("72", "the answer has no '####'"), ("so\n####  ", "nothing follows")])
def test_a_solution_without_its_gold_is_refused_with_file_and_line(tmp_path, solution, fault):
    path = write(tmp_path, SOLVED + gsm8k_line("And now?", solution))
    with pytest.raises(UserError) as error:
        load_pairs(str(path), data_format="gsm8k")
    assert str(error.value).startswith(f"{path}:2: ") and fault in str(error.value)


def test_auto_takes_gsm8k_by_its_first_line_and_other_fields_as_they_stand(tmp_path):
    path = write(tmp_path, SOLVED)
    assert load_pairs(str(path)) == [Pair("How many clips?", "72", f"{path}:1")]
    assert load_pairs(str(path), prompt_field="question")[0].answer == "72"
    as_it_stands = load_pairs(str(path), data_format="jsonl", prompt_field="question")
    assert as_it_stands[0].answer.endswith("#### 72")

    path = write(tmp_path, b'{"question": "q", "prompt": "p", "answer": "x #### 1"}\n')
    assert load_pairs(str(path))[0] == Pair("p", "x #### 1", f"{path}:1")
    path = write(tmp_path, b'{"question": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match=f"^{path}:1: no field 'prompt'"):
        load_pairs(str(path))


def test_count_takes_the_first_rows_and_must_be_positive(tmp_path):
    path = write(tmp_path, GOOD * 5)
    assert [pair.place for pair in load_pairs(str(path), count=2)] == [f"{path}:1", f"{path}:2"]
    assert len(load_pairs(str(path), count=9)) == 5
    with pytest.raises(UserError, match="was asked for 0 examples"):
        load_pairs(str(path), count=0)


@pytest.mark.parametrize(("count", "taken"), [(2, 2), (0, 5), (9, 5)])
def test_a_source_knows_of_how_many_the_first_ones_were_taken(tmp_path, count, taken):
    path = write(tmp_path, GOOD * 5 + b"{}\n")
    config = parse_args(["--bad-records", "drop"])
    reading = read_source(config, str(path), "heldout", "--eval-data", count=count)
    assert (reading.taken, reading.total) == (taken, 5)
    assert number_of(reading.taken, reading.total) == ("2 of 5" if taken == 2 else "5")
    assert number_of(64, 1319) == "64 of 1,319"


def test_an_unknown_format_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="--data-format json is not known; did you mean jsonl"):
        load_pairs("x.jsonl", data_format="json")


def test_builtin_pairs_say_where_they_come_from():
    pairs = load_pairs("builtin:recall", count=3, seed=5, split="heldout")
    assert [pair.place for pair in pairs] == [f"builtin:recall[{row}]" for row in range(3)]
    assert pairs != load_pairs("builtin:recall", count=3, seed=5, split="train")


@pytest.mark.skipif("GSM8K" not in os.environ, reason="GSM8K does not name the official train file")
def test_the_official_train_file_is_read_whole():
    pairs = load_pairs(os.environ["GSM8K"])
    assert len(pairs) == 7473
    assert pairs[0].answer == "72" and pairs[0].prompt.startswith("Natalia sold clips to 48 of her friends")
    assert all(pair.answer.lstrip("-").replace(".", "", 1).isdigit() for pair in pairs)
