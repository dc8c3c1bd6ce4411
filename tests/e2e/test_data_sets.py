"""Data through the whole command line: what --show-example prints, prepared sets, bad records."""

import json
import os
from pathlib import Path

import pytest

from megatron_jq.cli.main import main
from megatron_jq.train import heldout
from tests.e2e.launch import SMALL, run
from tests.e2e.records import FINQA, GSM8K, RECORDS, chat_folder
from tools.prepare_data import main as prepare_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat"))


def shown(capsys, folder: Path, *argv: str) -> str:
    flags = ["--tokenizer-type", "huggingface", "--tokenizer-model", str(folder), "--max-position-embeddings", "4096"]
    assert main(["train", *flags, *argv]) == 0
    return capsys.readouterr().out


def test_show_example_says_what_is_weighted_under_an_estimator_that_samples_answers(folder, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GSM8K) + "\n")
    out = shown(capsys, folder, "--train-data", str(path), "--estimator", "grpo", "--show-example", "0")
    assert "answer y*: 2 tokens, weight 0: sampled answers are compared with it" in out
    assert "sampled answer y: up to 2 tokens, weight: the answer's coefficient" in out


def test_show_example_of_a_task_trains_its_tokenizer_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--show-example", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("training example 5 of 1024, builtin:recall[5]\n") and "│ .│<think>\n" in out
    assert os.listdir() == []


def test_an_old_name_of_a_setting_is_noted_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.toml").write_text('normalise = "text"\n')
    assert main(["train", "--config", "old.toml", "--show-example", "5"]) == 0
    note = "--normalise is now --match-rule (match_rule in a file); the next version does not read the old name\n"
    out = capsys.readouterr().out
    assert out.startswith(note) and out.count("--normalise") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--show-example", "1024"], "--show-example 1024: there are 1024 training examples, counted from 0"),
        (["--show-example", "-1"], "--show-example must be at least 0, not -1"),
        (["--show-example", "0", "--load", "x"], "--show-example does not open checkpoints; name the tokenizer"),
        (["--prompt-style", "warm", "--show-example", "0"], "a sentencepiece tokenizer has no chat template"),
        (
            ["--prompt-template", "no.toml", "--prompt-style", "cold", "--show-example", "0"],
            "cannot read no.toml: No such file",
        ),
        (["--prompt-template", ""], "--prompt-template must not be empty"),
    ],
)
def test_bad_input_to_the_settings_of_prompts_is_refused(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_template_of_one_s_own_replaces_the_words(folder, tmp_path, capsys):
    (tmp_path / "my.toml").write_text('[cold]\nprompt = "{question} {{{table}}}"\nafter_close = " "\n')
    (tmp_path / "data.json").write_text(json.dumps([FINQA]))
    flags = ["--prompt-style", "cold", "--prompt-template", str(tmp_path / "my.toml"), "--show-example", "0"]
    out = shown(capsys, folder, "--train-data", str(tmp_path / "data.json"), *flags)
    prompt = out.partition("weight 0\n")[2].partition("\n\nrationale")[0]
    text = prompt.replace("\n  ", "").replace("│", "").replace("\\n", "\n").strip()
    assert text == "what was the growth rate of revenue ? { | 2017 | 2016\nrevenue | $ 12.5 | $ 10.0}<think>"
    assert "bridge: 1 token, given, weight 0\n   \n" in out
    assert "answer y*: 5 tokens" in out and "\n  0│.│2│5│<|im_end|>" in out


@pytest.mark.parametrize(
    ("name", "style", "estimator"),
    [("finqa", "warm", "garl"), ("hotpotqa", "cold", "paft"), ("musique", "warm", "grpo"), ("gsm8k", "cold", "rloo")],
)
def test_each_data_set_trains_in_each_style(name, style, estimator, folder, tmp_path):
    """Two steps on format-true records, in one JSON list, evaluated on the same. Engine and trainer agree on ln w, with
    a bridge (warm) and without.
    """
    identity = "_id" if name == "hotpotqa" else "id"
    records = [{**RECORDS[name], identity: f"record {number}"} for number in range(5)]
    (tmp_path / "data.json").write_text(json.dumps(records, indent=1))
    sources = ["--train-data", str(tmp_path / "data.json"), "--eval-data", str(tmp_path / "data.json")]
    tokens = ["--tokenizer-type", "huggingface", "--tokenizer-model", str(folder), "--max-position-embeddings", "512"]
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *sources, *tokens, "--prompt-style", style]
    scored = ["--score-with", "rollout", "--score-check-interval", "1"]
    (ended,) = run([*argv, *scored, "--estimator", estimator, "--train-iters", "2"], tmp_path)
    assert ended.code == 0, ended
    assert "5 training and 4 of 5 held-out examples" in ended.out
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and metrics[1]["eval_exact_match"] is not None
    assert all(row["log_w_mismatch_max"] < 1e-3 for row in metrics)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_automatic_normalisation_goes_by_the_format_that_was_found(is_prepared, tmp_path, capsys):
    """GSM8K's is numbers; `--data-format` says auto."""
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps({**GSM8K, "question": f"Question {n}?"}) + "\n" for n in range(4)))
    flags = ["--train-data", str(source), "--eval-data", str(source), "--tokenizer-vocab-size", "285"]
    if is_prepared:
        assert prepare_main([*flags, "--output", str(tmp_path / "set")]) == 0
        flags = ["--train-data", str(tmp_path / "set")]

    def tell_the_judge(_rank: int) -> None:
        evaluate = heldout.evaluate
        heldout.evaluate = lambda *given, judge, **named: print(judge) or evaluate(*given, judge=judge, **named)

    argv = [*SMALL, *flags, "--run-dir", str(tmp_path / "run"), "--train-iters", "1", "--match-rule", "auto"]
    (ended,) = run(argv, tmp_path, prepare=tell_the_judge)
    assert ended.code == 0, ended
    assert "Judge(match='exact', rule='number', extract='none', ratios=False)" in ended.out


def test_gold_answers_that_the_tokenizer_changes_are_counted_wherever_they_are_read(tmp_path, capsys):
    """U+2581 is sentencepiece's own mark for a blank, and comes back as one."""
    source, changed = tmp_path / "data.jsonl", "the tokenizer changes 1 of 4 gold answers: "
    answers = ["blue", "a\u2581b", "green", "a b"]
    records = [{"prompt": f"Box {n}?", "answer": answer} for n, answer in enumerate(answers)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = ["--train-data", str(source), "--tokenizer-vocab-size", "285"]
    assert prepare_main([*data, "--output", str(tmp_path / "set")]) == 0
    assert f"--train-data {source}: {changed}{source}:2 ('a\u2581b' as 'a b')" in capsys.readouterr().out
    argv = [*SMALL, *data, "--eval-data", str(source), "--run-dir", str(tmp_path / "run"), "--train-iters", "1"]
    (ended,) = run(argv, tmp_path)
    assert ended.code == 0, ended
    for flag in ("--train-data", "--eval-data"):
        assert f"warning: {flag} {source}: {changed}" in ended.out
    argv = ["evaluate", "--load", str(tmp_path / "run" / "checkpoints"), "--eval-samples", "2", "--device", "cpu"]
    (ended,) = run([*argv, "--eval-temperature", "1", "--output", str(tmp_path / "out")], tmp_path)
    assert ended.code == 0 and f"warning: --eval-data {source}: {changed}" in ended.out, ended
    golds = {
        tuple(json.loads(line)["golds"]) for line in (tmp_path / "out" / "samples.jsonl").open() if '"golds"' in line
    }
    assert ("a\u2581b", "a b") in golds and ("blue",) in golds


# Prepared sets


def rows(count: int, start: int = 0) -> str:
    return "".join(json.dumps({"prompt": f"{i} and {i} are", "answer": str(2 * i)}) + "\n" for i in range(start, count))


@pytest.fixture
def prepared(tmp_path, capsys) -> Path:
    (tmp_path / "data.jsonl").write_text(rows(40))
    argv = ["--train-data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "set")]
    assert prepare_main([*argv, "--split-sizes", "train=30,validation=10", "--tokenizer-vocab-size", "280"]) == 0
    capsys.readouterr()
    return tmp_path / "set"


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_trains_on_a_prepared_set_with_its_tokenizer_and_evaluates_on_its_validation_split(
    size, prepared, tmp_path
):
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), "--train-data", str(prepared), "--eval-interval", "2"]
    ended = run([*argv, "--tensor-model-parallel-size", str(size)], tmp_path, size=size)
    assert [end.code for end in ended] == [0] * size, ended
    assert "30 training and 4 of 10 held-out examples" in ended[0].out
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["eval_exact_match"] is not None and len(metrics) == 3
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("iter_*")
    assert (checkpoint / "tokenizer" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()


def test_a_prepared_run_goes_on_from_its_source_and_not_from_another_set(prepared, tmp_path):
    first = ["--run-dir", str(tmp_path / "run"), "--train-data", str(prepared)]
    (ended,) = run([*SMALL, *first], tmp_path)
    assert ended.code == 0, ended
    manifest = json.loads((prepared / "manifest.json").read_text())
    (saved,) = (tmp_path / "run" / "checkpoints").glob("iter_*/checkpoint.json")
    assert json.loads(saved.read_text())["data"] == manifest["splits"]["train"]["fingerprint"]
    (ended,) = run([*SMALL, *first, "--resume", "--train-iters", "4"], tmp_path)
    assert ended.code == 0, ended

    (tmp_path / "other.jsonl").write_text(rows(50))
    argv = ["--train-data", str(tmp_path / "other.jsonl"), "--output", str(tmp_path / "other")]
    assert prepare_main([*argv, "--tokenizer-model", str(prepared / "tokenizer.model")]) == 0
    prepared.rename(tmp_path / "old")
    (tmp_path / "other").rename(prepared)
    (ended,) = run([*SMALL, *first, "--resume", "--train-iters", "5"], tmp_path)
    assert ended.code == 2 and "was trained on other data than --train-data gives now" in ended.err
    assert prepare_main([*argv[:-1], str(tmp_path / "third"), "--tokenizer-vocab-size", "284"]) == 0
    load = ["--run-dir", str(tmp_path / "new"), "--load", str(tmp_path / "run" / "checkpoints"), "--finetune"]
    (ended,) = run([*SMALL, *load, "--train-data", str(tmp_path / "third")], tmp_path)
    assert ended.code == 2 and "was prepared with another tokenizer than the checkpoint's" in ended.err


@pytest.mark.parametrize("size", [1, 2])
def test_bad_records_are_refused_or_left_out_and_told_once(size, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(rows(8) + '{"prompt": "9 and 9 are"}\nnot JSON\n' + rows(12, 8))
    flags = ["--train-data", str(path), "--tokenizer-vocab-size", "278", "--prompts-per-step", "2"]
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), "--tensor-model-parallel-size", str(size), *flags]
    for end in run(argv, tmp_path, size=size):
        assert end.code == 2 and f"error: {path}:9: no field 'answer'" in end.err
        assert f"(and 1 more bad records: {path}:10 (not JSON); --bad-records drop leaves" in end.err
    ended = run([*argv, "--bad-records", "drop"], tmp_path, size=size)
    assert [end.code for end in ended] == [0] * size, ended
    told = f"--train-data {path}: 2 bad records left out (1 no answer, 1 not JSON): {path}:9, {path}:10"
    assert [told in end.out for end in ended] == [True] + [False] * (size - 1)
    assert "12 training and 0 held-out examples" in ended[0].out


def test_an_alias_counts_as_right_where_sampled_answers_are_judged(folder):
    from megatron_jq.data.tokenizers import load_tokenizer
    from megatron_jq.evaluate import answer_matches
    from megatron_jq.records import Example

    tokenizer = load_tokenizer("huggingface", folder)
    example = Example(0, "p", "Aldeby", (1,), (2,), aliases=("Aldeby town",))
    for text, right in (("Aldeby", True), ("\n\nAldeby town", True), ("town", False), ("Aldeby, Aldeby town", False)):
        assert answer_matches((*tokenizer.encode(text), tokenizer.eos_id), example, tokenizer) is right
    start = tokenizer.encode_chat(tokenizer.chat_frame(system=False), [""])[0]
    assert not answer_matches((*tokenizer.encode("Aldeby"), start, tokenizer.eos_id), example, tokenizer)
