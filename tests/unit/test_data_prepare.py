"""Prepared sets: splits, the folder and its checks, the report, and that the same input gives the same bytes."""

import hashlib
import json
import os
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.config import Config, parse_args
from megatron_jq.data.lengths import Budgets, Lengths, quantiles
from megatron_jq.data.prepare import prepare
from megatron_jq.data.prepared import has_split, is_prepared, read_prepared
from megatron_jq.data.prompts import Placed, fingerprint
from megatron_jq.data.reading import encode_reading, heldout_source, read_source
from megatron_jq.data.splits import cut, parse_sizes, shared_prompts
from megatron_jq.data.tokenizers import load_tokenizer
from megatron_jq.errors import UserError
from megatron_jq.records import Example
from tests.unit.tokenizer_kinds import make
from tools.prepare_data import main


def placed(count: int, start: int = 0) -> list[Placed]:
    return [
        Placed(Example(i, f"question {start + i}", str(i), (start + i, 1), (2, 3)), f"data.jsonl:{i + 1}")
        for i in range(count)
    ]


def place(some) -> list[str]:
    return [one.place for one in some]


def write(tmp_path, count=30, name="data.jsonl", start=0, **extra) -> str:
    path = tmp_path / name
    rows = ({"prompt": f"{i} and {i} are", "answer": str(2 * i), **extra} for i in range(start, start + count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(*argv: str) -> Config:
    return parse_args([*argv, *([] if "--tokenizer-vocab-size" in argv else ["--tokenizer-vocab-size", "280"])])


def made(tmp_path, *argv, name="set", test_data=None, split_sizes=None):
    return prepare(config(*argv), tmp_path / name, test_data=test_data, split_sizes=split_sizes, context=None)


def folder_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Splits


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 20), st.integers(0, 3))
def test_splits_have_the_asked_sizes_never_meet_and_keep_the_order(train, validation, left, seed):
    rows = placed(train + validation + left)
    sizes = {"train": train, "validation": validation}
    splits = cut({("train", "validation"): rows}, sizes, seed)
    assert {name: len(some) for name, some in splits.items()} == sizes
    chosen = [row for some in splits.values() for row in some]
    assert len({row.place for row in chosen}) == len(chosen)
    for some in splits.values():
        assert [row.example.index for row in some] == sorted(row.example.index for row in some)


def test_a_split_depends_on_the_examples_and_the_seed_and_not_on_their_order():
    rows, sizes = placed(40), {"train": None, "test": 9}
    splits = cut({("train", "test"): rows}, sizes, 5)
    again = cut({("train", "test"): rows[::-1]}, sizes, 5)
    assert {name: sorted(place(some)) for name, some in splits.items()} == {
        name: sorted(place(some)) for name, some in again.items()
    }
    assert len(splits["train"]) == 31
    assert place(splits["test"]) != place(cut({("train", "test"): rows}, sizes, 6)["test"])


def test_a_split_is_these_rows_on_every_machine():
    splits = cut({("train", "validation"): placed(12)}, {"train": None, "validation": 3}, 1234)
    keys = {row.place: hashlib.sha256(f"1234\0question {i}\0{i}".encode()).digest() for i, row in enumerate(placed(12))}
    assert set(place(splits["validation"])) == set(sorted(keys, key=keys.get)[-3:])


def test_a_source_that_is_too_small_or_two_rests_are_refused():
    with pytest.raises(UserError, match="asks for 13 examples of train, test, and their source has 12"):
        cut({("train", "test"): placed(12)}, {"train": 10, "test": 3}, 0)
    with pytest.raises(UserError, match="asks for 12 examples"):  # nothing would be left for the rest
        cut({("train", "test"): placed(12)}, {"train": 12, "test": None}, 0)
    with pytest.raises(UserError, match="train and test come from one source, and only one can be the rest"):
        cut({("train", "test"): placed(12)}, {"train": None, "test": None}, 0)


def test_prompts_in_two_splits_are_counted():
    splits = {"train": placed(5), "validation": placed(3, start=3), "test": placed(2, start=4)}
    assert shared_prompts(splits) == 3  # 3 and 4 stand in train and validation, 4 in test too; 5 in the last two
    assert shared_prompts({"train": placed(5), "test": placed(5, start=5)}) == 0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train", "train= is neither"),
        ("train=0", "train=0 is neither a number above 0 nor rest"),
        ("train=1.5", "train=1.5 is neither"),
        ("train=²", "is neither"),
        ("dev=5", "no split is called 'dev'"),
        ("valid=5", "did you mean validation"),
        ("train=5,train=6", "train is given twice"),
        ("", "no split is called ''"),
    ],
)
def test_faulty_sizes_are_refused(text, fault):
    with pytest.raises(UserError, match=fault):
        parse_sizes(text)
    assert parse_sizes("train=7, test=rest") == {"train": 7, "test": None}


# The folder


def test_a_prepared_split_gives_the_examples_that_its_source_gives(tmp_path):
    path = write(tmp_path)
    done = made(tmp_path, "--train-data", path)
    tokenizer = load_tokenizer("sentencepiece", done.folder / "tokenizer.model")
    settings = config("--train-data", path)
    direct = encode_reading(settings, read_source(settings, path, "train", "--train-data"), tokenizer)
    read = read_prepared(str(done.folder), "train")
    assert read.placed == direct.placed and len(read.placed) == 30
    assert read.tokenizer == tokenizer.fingerprint()
    assert read_prepared(str(done.folder), "train", count=4).placed == direct.placed[:4]


def test_the_same_input_gives_the_same_bytes_and_other_input_another_content(tmp_path):
    path = write(tmp_path)
    argv, sizes = ("--train-data", path), "train=20,validation=5,test=rest"
    one = made(tmp_path, *argv, split_sizes=sizes, name="one")
    two = made(tmp_path, *argv, split_sizes=sizes, name="two")
    assert folder_bytes(one.folder) == folder_bytes(two.folder) and one.content == two.content
    other = made(tmp_path, *argv, "--seed", "7", split_sizes=sizes, name="other")
    assert other.content != one.content
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "one", "other", "two"]


def test_the_manifest_holds_the_fingerprint_that_a_run_compares_on_resume(tmp_path):
    done = made(tmp_path, "--train-data", write(tmp_path))
    manifest = json.loads((done.folder / "manifest.json").read_text())
    examples = [one.example for one in read_prepared(str(done.folder), "train").placed]
    assert manifest["splits"]["train"]["fingerprint"] == fingerprint(examples)
    assert manifest["splits"]["train"]["rows"] == 30


def test_a_fingerprint_knows_ids_their_boundaries_order_and_aliases():
    base = Example(0, "p", "a", (1, 2), (3, 4))
    variants = [
        [base],
        [replace(base, prompt_ids=(1, 3))],
        [replace(base, prompt_ids=(1,), answer_ids=(2, 3, 4))],
        [replace(base, aliases=("b",))],
        [replace(base, aliases=("b", "c"))],
        [replace(base, aliases=("bc",))],
        [replace(base, bridge_ids=(5,))],
        [replace(base, bridge_ids=(5, 5))],
        [replace(base, answer_ids=(5, 3, 4))],
        [base, replace(base, prompt_ids=(9,))],
        [replace(base, prompt_ids=(9,)), base],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint([base]) == fingerprint([replace(base, index=5, prompt_text="other")])
    # An example without a bridge has the fingerprint that it had before there were any: SHA-256 of 2, 1, 2, 2, 3, 4.
    numbers = b"".join(number.to_bytes(8, "little") for number in (2, 1, 2, 2, 3, 4))
    assert fingerprint([base]) == hashlib.sha256(numbers).hexdigest()


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "manifest", "format", "split"])
def test_a_damaged_set_is_refused(tmp_path, damage):
    folder = made(tmp_path, "--train-data", write(tmp_path)).folder
    file, manifest = folder / "train.jsonl", folder / "manifest.json"
    content = file.read_bytes()
    match damage:
        case "byte":
            file.write_bytes(content.replace(b'"answer": "2"', b'"answer": "3"'))
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "gone":
            file.unlink()
        case "manifest":
            manifest.write_text("{}")
        case "format":
            manifest.write_text(manifest.read_text().replace('"format": 4', '"format": 1'))
        case "split":
            manifest.write_text(manifest.read_text().replace('"train"', '"training"'))
    faults = {
        "byte": "was changed or damaged",
        "cut": "was changed or damaged",
        "gone": "train.jsonl: No such file",
        "manifest": "is no manifest",
        "format": "its format is 1, this version reads 4; prepare it again",
        "split": "has no split train; it has training",
    }
    with pytest.raises(UserError, match=faults[damage]) as error:
        read_prepared(str(folder), "train")
    assert str(folder) in str(error.value)


def test_a_set_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="--output .*set cannot be written: No space left on device"):
        made(tmp_path, "--train-data", path)
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_a_split_of_its_own_and_a_split_by_its_file_are_found(tmp_path):
    path, dev = write(tmp_path), write(tmp_path, 5, "dev.jsonl", start=100)
    test = write(tmp_path, 3, "test.jsonl", start=200)
    folder = str(made(tmp_path, "--train-data", path, "--eval-data", dev, test_data=test).folder)
    assert is_prepared(folder) and is_prepared(f"{folder}/test.jsonl") and not is_prepared(test)
    assert has_split(folder, "validation") and not has_split(path, "validation")
    assert heldout_source(config("--train-data", folder)) == folder
    assert heldout_source(config("--train-data", path)) is None
    settings = config("--train-data", folder, "--eval-data", f"{folder}/test.jsonl")
    read = read_source(settings, heldout_source(settings), "heldout", "--eval-data").prepared
    assert [one.example.answer_text for one in read.placed] == ["400", "402", "404"]


def test_a_prepared_set_of_another_tokenizer_or_style_is_refused(tmp_path):
    path = write(tmp_path)
    folder = str(made(tmp_path, "--train-data", path, "--prompt-style", "cold").folder)
    other = made(tmp_path, "--train-data", write(tmp_path, 40, "more.jsonl"), name="other").folder / "tokenizer.model"
    settings = config("--train-data", folder)
    reading = read_source(settings, folder, "train", "--train-data")
    with pytest.raises(UserError, match=f"{folder} was prepared with another tokenizer; use its own, --tokenizer-mod"):
        encode_reading(settings, reading, load_tokenizer("sentencepiece", other))
    read_source(config("--prompt-style", "cold"), folder, "train", "--train-data")
    with pytest.raises(UserError, match="was prepared with --prompt-style cold; leave --prompt-style"):
        read_source(config("--prompt-style", "warm"), folder, "train", "--train-data")
    with pytest.raises(UserError, match="is a prepared set already"):
        made(tmp_path, "--train-data", folder, name="twice")


# The report


def test_quantiles_are_lengths_that_occur():
    for lengths in ([5], [3, 1, 2], list(range(1, 101)), [7] * 9 + [100]):
        smallest, median, at_95, largest = quantiles(lengths)
        assert (smallest, median, largest) == (min(lengths), statistics.median_low(lengths), max(lengths))
        assert at_95 == np.quantile(lengths, 0.95, method="inverted_cdf")
    assert quantiles([]) == (0, 0, 0, 0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1), st.integers(1, 9), st.integers(1, 9))
def test_what_fits_is_counted_as_by_hand(lengths, prompt_limit, answer_limit):
    prompts, answers = zip(*lengths, strict=True)
    budgets = Budgets(prompt_limit, 4, answer_limit, 12)
    assert Lengths("x", prompts, answers).within(budgets) == (
        len([p for p in prompts if p <= prompt_limit]),
        len([a for a in answers if a <= answer_limit]),
        len([p for p in prompts if p + 4 + 1 + answer_limit <= 12]),
    )
    free = Lengths("x", prompts, answers).within(Budgets(None, 4, None, 12))
    assert free == (len(prompts), len(answers), len([1 for p, a in lengths if p + 4 + 1 + a <= 12]))
    joined = Lengths("x", prompts, answers, bridge=2).within(Budgets(None, 4, None, 12))
    assert joined == (len(prompts), len(answers), len([1 for p, a in lengths if p + 4 + 1 + 2 + a <= 12]))


def test_rows_that_are_left_out_are_counted_by_reason_and_named_by_file_and_line(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} and", "answer": "1"} for i in range(5)]
    rows[1]["answer"] = "1" * 40
    rows[2]["prompt"] = "and " * 90
    rows[3]["answer"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "ÿ"')
    limits = ("--max-prompt-tokens", "30", "--answer-budget", "10")
    argv = ("--train-data", str(path), "--tokenizer-vocab-size", "270", *limits)
    with pytest.raises(UserError, match=f"^{path}:4: field 'answer' is null"):
        made(tmp_path, *argv)
    with pytest.raises(UserError, match="2 of 4 examples exceed 30 prompt tokens and 10 answer tokens"):
        made(tmp_path, *argv, "--bad-records", "drop")
    assert os.listdir(tmp_path) == ["data.jsonl"]
    done = made(tmp_path, *argv, "--bad-records", "drop", "--overlong-prompts", "drop")
    dropped = [json.loads(line) for line in (done.folder / "dropped.jsonl").read_text().splitlines()]
    assert [(row["where"], row["kind"]) for row in dropped] == [
        (f"{path}:4", "no answer"),
        (f"{path}:6", "not JSON"),
        (f"{path}:2", "answer too long"),
        (f"{path}:3", "prompt too long"),
    ]
    assert "1 answer too long, 1 no answer, 1 not JSON, 1 prompt too long" in done.report
    assert f"| --train-data {path} | 4 | 3 | 3 | 4 |" in done.report
    assert [one.place for one in read_prepared(str(done.folder), "train").placed] == [f"{path}:1", f"{path}:5"]


def test_records_of_a_list_on_one_line_are_told_apart(tmp_path):
    path = tmp_path / "data.json"
    rows = [{"prompt": "and " * (90 if i == 3 else 1) + str(i), "answer": "1"} for i in range(5)]
    path.write_text(json.dumps(rows))
    limits = ("--max-prompt-tokens", "30", "--tokenizer-vocab-size", "270")
    with pytest.raises(UserError, match=r"data.json:1\[3\] \(\d+ prompt tokens\)"):
        made(tmp_path, "--train-data", str(path), *limits)
    done = made(tmp_path, "--train-data", str(path), *limits, "--overlong-prompts", "drop")
    (dropped,) = (json.loads(line) for line in (done.folder / "dropped.jsonl").read_text().splitlines())
    assert dropped["where"] == f"{path}:1[3]"
    kept = read_prepared(str(done.folder), "train").placed
    assert [one.place for one in kept] == [f"{path}:1", *(f"{path}:1[{i}]" for i in (1, 2, 4))]


def test_the_paper_s_sizes_are_a_preset_where_there_are_some(tmp_path, capsys):
    path = write(tmp_path)
    argv = ["--output", str(tmp_path / "set"), "--train-data", path, "--tokenizer-vocab-size", "280"]
    assert main([*argv, "--split-sizes", "paper"]) == 2
    assert "--split-sizes paper: the paper has none for this data" in capsys.readouterr().err
    record = {
        "question": "Who?",
        "answer": "Ada",
        "supporting_facts": [],
        "context": [["Ada", ["Ada Holm wrote five novels."]]],
    }
    (tmp_path / "hotpot.jsonl").write_text("".join(json.dumps({**record, "_id": str(i)}) + "\n" for i in range(20)))
    argv[3:] = [str(tmp_path / "hotpot.jsonl"), "--tokenizer-vocab-size", "288"]
    assert main([*argv, "--split-sizes", "paper"]) == 2
    assert "asks for 9752 examples of train, validation, test, and their source has 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "{here}"], "--output {here} exists"),
        (["--output", "{here}/data.jsonl/set"], "--output {here}/data.jsonl/set cannot be written: File exists"),
        (["--split-sizes", "validation=3"], "--split-sizes validation=3 lacks train"),
        (["--split-sizes", "train=3", "--test-data", "{here}/data.jsonl"], "--split-sizes train=3 lacks test"),
        (["--tokenizer-type", "huggingface"], "--tokenizer-type huggingface needs --tokenizer-model"),
        (["--outptu", "x"], "unknown flag --outptu"),
        (["--estimator", "pretrain"], "--estimator pretrain reads --data-path"),
        (["--train-data", "builtin:recall", "--test-data", "builtin:recall"], "built-in tasks have no third split"),
    ],
)
def test_bad_input_to_the_tool_ends_with_2_and_one_line(tmp_path, capsys, argv, message):
    given = [text.format(here=tmp_path) for text in argv]
    base = ["--train-data", write(tmp_path), "--tokenizer-vocab-size", "280", "--output", str(tmp_path / "set")]
    assert main([*base, *given] if "--train-data" not in argv else [*base[4:], *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("prepare_data: error: ") and err.count("\n") == 1
    assert message.format(here=tmp_path) in err
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl"]


def test_the_tool_prints_its_report_and_the_folder(tmp_path, capsys):
    folder = tmp_path / "set"
    argv = ["--train-data", write(tmp_path), "--output", str(folder), "--tokenizer-vocab-size", "280"]
    assert main([*argv, "--split-sizes", "train=20,test=10", "--model", "small"]) == 0
    out = capsys.readouterr().out
    assert (folder / "report.md").read_text() in out and out.endswith(f"\n{folder}\n")
    assert "| train | 20 |" in out and "| test | 10 |" in out
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")


# The beginning of a text and the date


def test_a_set_keeps_the_settings_of_its_prompts_and_refuses_others(tmp_path):
    source = write(tmp_path)
    folder = make(tmp_path / "tokenizer", "prepend", bos="before", chat_template="{{ messages[0].content }}")
    flags = ["--train-data", source, "--tokenizer-type", "huggingface", "--tokenizer-model", str(folder)]
    made(tmp_path, *flags, "--chat-date", "2024-07-26")
    made(tmp_path, *flags, "--add-bos-token", "off", name="without")
    tokenizer, read = load_tokenizer("huggingface", folder), {}
    for name in ("set", "without"):
        reading = read_source(config(), str(tmp_path / name), "train", "--train-data")
        read[name] = encode_reading(config(), reading, tokenizer)
    begins, bare = read["set"].placed[3].example.prompt_ids, read["without"].placed[3].example.prompt_ids
    assert begins == (*tokenizer.bos_ids("on"), *bare)
    assert read["set"].notes == () and "--add-bos-token off" in " ".join(read["without"].notes)
    for name, wrong, was in (
        ("set", ("--add-bos-token", "off"), "with --add-bos-token auto"),
        ("without", ("--add-bos-token", "on"), "with --add-bos-token off"),
        ("set", ("--chat-date", "2025-01-01"), "with --chat-date 2024-07-26"),
        ("without", ("--chat-date", "2025-01-01"), "without --chat-date"),
    ):
        with pytest.raises(UserError, match=f"was prepared {was}; leave {wrong[0]} out"):
            read_source(config(*wrong), str(tmp_path / name), "train", "--train-data")


def test_a_set_from_before_those_settings_is_read_as_it_was(tmp_path):
    made(tmp_path, "--train-data", write(tmp_path), "--add-bos-token", "off")
    manifest = tmp_path / "set" / "manifest.json"
    table = json.loads(manifest.read_text())
    new = read_prepared(str(tmp_path / "set"), "train")
    del table["add_bos_token"], table["chat_date"]
    manifest.write_text(json.dumps({**table, "format": 2}))
    assert read_prepared(str(tmp_path / "set"), "train") == new
