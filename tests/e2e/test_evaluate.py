"""`megatron-jq evaluate` on a policy that a short run trained: the log's figures, at any layout, killed or whole."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest

from megatron_jq.checkpoint.folder import read_manifest
from megatron_jq.checkpoint.loader import Checkpoint
from megatron_jq.evaluate import loop
from megatron_jq.evaluate.inputs import settings_of
from megatron_jq.evaluate.samples import Sample, SampleFile, read_samples
from tests.e2e.launch import run

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
COLOURS = ("red", "blue", "green")
NUM_PROMPTS = 12


def write_data(path: Path, rows: range) -> None:
    """What a box holds is no one's guess: a policy that has learnt the answers' words is right now and then."""
    colours = [COLOURS[row * row % 7 % 3] for row in rows]
    records = [
        {"prompt": f"box {row}", "answer": [colour, "COLOUR"]} for row, colour in zip(rows, colours, strict=True)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder, of four evaluations with 4 samples each; and, beside it, the data's."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "train.jsonl", range(40))
    write_data(folder / "test.jsonl", range(40, 40 + NUM_PROMPTS))
    argv = (
        f"train --train-data {folder}/train.jsonl --eval-data {folder}/test.jsonl --run-dir {folder}/run "
        "--q 1 --lr 5e-3 --tokenizer-vocab-size 290 --prompts-per-step 8 --num-rationales 4 --rationale-budget 4 "
        "--train-iters 24 --match substring --eval-samples 4 --eval-temperature 0.7 --eval-interval 6 "
        "--save-interval 6 --keep-last 1 --keep-best eval_maj_at_k --sample-interval 0 --no-tensorboard --device cpu"
    )
    [ended] = run(argv.split(), folder)
    assert ended.code == 0, ended
    return folder / "run"


def evaluations(run_dir: Path) -> dict[int, dict]:
    """{steps done: line of metrics.jsonl} where the run was evaluated."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return {line["step"] + 1: line for line in lines if line["eval_exact_match"] is not None}


def evaluate(folder: Path, *flags: str, size: int = 1, output: str = "out") -> tuple[str, dict]:
    """(rank 0's words, evaluation.json) of an evaluation that ends well."""
    argv = ["evaluate", *flags, "--output", str(folder / output)]
    ended = run([*argv, "--device", "cpu"], folder, size=size)
    assert [rank.code for rank in ended] == [0] * size, ended
    return ended[0].out, json.loads((folder / output / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> Path:
    """The folder of an evaluation of the last checkpoint on one process, as the run evaluated it."""
    folder = tmp_path_factory.mktemp("alone")
    evaluate(folder, *AS_THE_RUN, "--load", str(trained / "checkpoints"))
    return folder / "out"


AS_THE_RUN = ["--eval-samples", "4"]


def values(results: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in results["metrics"].items()}


def draws(output: Path) -> list[list[tuple]]:
    return [
        [(s.rationale_ids, s.forced, s.answer_ids) for s in some] for some in read_samples(output / "samples.jsonl")[1]
    ]


def test_it_repeats_the_training_logs_figures(trained, alone, tmp_path):
    logged = evaluations(trained)[24]
    found = values(json.loads((alone / "evaluation.json").read_text()))
    assert 0 < found["pass@1"] < 1
    assert (found["pass@4"], found["maj@4"]) == (logged["eval_pass_at_k"], logged["eval_maj_at_k"])
    exact = ["--match", "exact", "--metrics", "pass@1", "--output", str(tmp_path)]
    [end] = run(["evaluate", "--rescore", str(alone / "samples.jsonl"), *exact], tmp_path)
    assert end.code == 0, end
    found = values(json.loads((tmp_path / "evaluation.json").read_text()))
    assert 0 < found["pass@1"] < 1 and found["pass@1"] == logged["eval_exact_match"]


def test_other_samples_agree_with_the_log_within_their_error(trained, tmp_path):
    out, results = evaluate(tmp_path, "--load", str(trained / "checkpoints"), "--seed", "77", "--match", "exact")
    assert results["evaluation"]["num_samples"] == 16 and results["evaluation"]["num_prompts"] == NUM_PROMPTS
    pass_1 = results["metrics"]["pass@1"]
    # of 4 samples and of 16 on the same prompts: the binomial's standard errors, at most
    error = (pass_1["value"] * (1 - pass_1["value"]) * (1 / 4 + 1 / 16) / NUM_PROMPTS) ** 0.5
    assert pass_1["value"] == pytest.approx(evaluations(trained)[24]["eval_exact_match"], abs=3 * error)
    assert pass_1["low"] <= pass_1["value"] <= pass_1["high"]
    assert results["log_p_mean"]["value"] < 0 and 0 < results["rationale_tokens_mean"]["value"] <= 4
    assert "pass@16" in out and "maj@16" in out and f"{pass_1['value']:.4f}" in out


def test_an_evaluation_of_some_of_the_data_says_so_and_by_default_it_takes_all(trained, alone, tmp_path):
    [checkpoint, *_] = (trained / "checkpoints").glob("iter_*")
    manifest = read_manifest(checkpoint)
    assert "eval_examples = 64" in manifest.config
    assert settings_of(Checkpoint(checkpoint, manifest)).data.eval_examples == 0
    assert json.loads((alone / "evaluation.json").read_text())["evaluation"]["num_available"] == NUM_PROMPTS
    few = ["--eval-examples", "5", "--eval-samples", "1"]
    out, results = evaluate(tmp_path, "--load", str(trained / "checkpoints"), *few)
    assert "the first 5 of 12 examples are evaluated; --eval-examples 0 takes all" in out
    assert f"test.jsonl: 5 of {NUM_PROMPTS} prompts x 1 samples" in out
    assert (results["evaluation"]["num_prompts"], results["evaluation"]["num_available"]) == (5, NUM_PROMPTS)


def test_checkpoints_carry_the_majority_vote_that_keep_best_goes_by(trained):
    found = {steps: line["eval_maj_at_k"] for steps, line in evaluations(trained).items()}
    assert len(found) == 4 and len(set(found.values())) > 1
    kept = {folder: read_manifest(folder) for folder in (trained / "checkpoints").glob("iter_*")}
    assert {manifest.step for manifest in kept.values()} == {24, max(found, key=found.__getitem__)}
    assert all(manifest.metrics["eval_maj_at_k"] == found[manifest.step] for manifest in kept.values())


@pytest.mark.parametrize(("flags", "size"), [(TP2, 2), (PP2, 2), ([], 2)], ids=["TP2", "PP2", "DP2"])
def test_every_layout_draws_the_same_tokens(flags, size, trained, alone, tmp_path):
    # five prompts a block and replica, so that blocks, waves and replicas cut elsewhere
    small = ["--rollout-batch-size", "5"]
    _, results = evaluate(tmp_path, "--load", str(trained / "checkpoints"), *AS_THE_RUN, *flags, *small, size=size)
    assert draws(tmp_path / "out") == draws(alone)
    whole = json.loads((alone / "evaluation.json").read_text())
    assert values(results) == values(whole)
    assert results["log_p_mean"]["value"] == pytest.approx(whole["log_p_mean"]["value"], abs=1e-4)


def test_judging_again_needs_no_model_and_gives_the_same_figures(alone, tmp_path):
    file = str(alone / "samples.jsonl")
    [again] = run(["evaluate", "--rescore", file, "--output", str(tmp_path / "new")], tmp_path)
    assert again.code == 0, again
    assert (tmp_path / "new" / "evaluation.json").read_bytes() == (alone / "evaluation.json").read_bytes()
    [other] = run(
        ["evaluate", "--rescore", file, "--match", "exact", "--match-rule=text", "--metrics", "maj@3,pass@2"],
        tmp_path,
    )
    assert other.code == 0, other
    assert "exact match, text normalised by rule text" in other.out and "maj@3" in other.out
    assert "pass@4" not in other.out


def killed_while_writing(rank: int) -> None:
    """The second block is cut in its last line, as by a power cut, and the process is gone."""
    append, written = SampleFile.append, []

    def cut(self: SampleFile, samples: list[Sample]) -> None:
        append(self, samples)
        written.append(samples)
        if len(written) == 2:
            self._file.truncate(self._file.tell() - 40)
            os.kill(os.getpid(), signal.SIGKILL)

    SampleFile.append = cut


def full_disk(rank: int) -> None:
    """Rank 0 finds no room for the second block."""
    append, calls = SampleFile.append, []

    def refuse(self: SampleFile, samples: list[Sample]) -> None:
        calls.append(samples)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, samples)

    SampleFile.append = refuse


def only_what_is_missing(rank: int) -> None:
    """Break the drawing of prompts that are in the file already."""
    draw = loop.draw

    def later(*arguments, first: int, **keywords):
        assert first >= 3, first
        return draw(*arguments, first=first, **keywords)

    loop.draw = later


def test_a_killed_evaluation_goes_on_where_it_stopped(trained, alone, tmp_path):
    # two prompts a block: the second block's cut leaves three whole prompts
    flags = ["--load", str(trained / "checkpoints"), *AS_THE_RUN, "--rollout-batch-size", "8"]
    argv = ["evaluate", *flags, "--output", str(tmp_path / "out"), "--device", "cpu"]
    [killed] = run(argv, tmp_path, prepare=killed_while_writing)
    assert killed.code == -signal.SIGKILL and not (tmp_path / "out" / "evaluation.json").exists()
    [stopped] = run(["evaluate", "--rescore", str(tmp_path / "out" / "samples.jsonl")], tmp_path)
    assert stopped.code == 2 and f"holds 3 of {NUM_PROMPTS} prompts" in stopped.err
    [resumed] = run(argv, tmp_path, prepare=only_what_is_missing)
    assert resumed.code == 0, resumed
    assert f"3 of {NUM_PROMPTS} prompts are done already" in resumed.out
    assert draws(tmp_path / "out") == draws(alone)
    assert values(json.loads((tmp_path / "out" / "evaluation.json").read_text())) == values(
        json.loads((alone / "evaluation.json").read_text())
    )


def test_a_full_disk_ends_every_rank_with_the_reason_and_keeps_what_was_written(trained, tmp_path):
    flags = ["--load", str(trained / "checkpoints"), *AS_THE_RUN, *TP2, "--rollout-batch-size", "8", "--device", "cpu"]
    ended = run(["evaluate", *flags, "--output", str(tmp_path / "out")], tmp_path, size=2, prepare=full_disk)
    for rank in ended:
        assert rank.code == 2, ended
        assert "--output: samples cannot be written: No space left on device; fix this" in rank.err
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 1 + 2 * 4


BLOCKED = {
    "evaluation.json": "--output {out} cannot be written: Is a directory",
    "samples.jsonl": "{out}/samples.jsonl: Is a directory",
    ".samples.jsonl": "--output: {out}/samples.jsonl cannot be written: Is a directory",
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_rank_0_cannot_write_ends_every_rank_with_its_name(name, trained, tmp_path):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    flags = ["--load", str(trained / "checkpoints"), *AS_THE_RUN, *TP2, "--device", "cpu", "--output", str(out)]
    for rank, end in enumerate(run(["evaluate", *flags], tmp_path, size=2)):
        message = f"[rank {rank}] megatron-jq: error: {BLOCKED[name].format(out=out)}"
        assert end.code == 2 and end.err.startswith(message) and end.err.count("\n") == 1, end


def test_a_hugging_face_folder_is_evaluated_as_the_checkpoint_it_came_from(trained, tmp_path):
    converted, checkpoints = tmp_path / "hf", str(trained / "checkpoints")
    [end] = run(["convert", "megatron-to-hf", "--load", checkpoints, "--hf", str(converted)], tmp_path)
    assert end.code == 0, end
    # Greedy: what is drawn does not depend on the step, which a folder does not know.
    greedy = ["--eval-samples", "1", "--eval-temperature", "0"]
    evaluate(tmp_path, "--load", checkpoints, *greedy, output="ours")
    data = ["--eval-data", str(trained.parent / "test.jsonl"), "--rationale-budget", "4"]
    _, results = evaluate(tmp_path, "--hf", str(converted), *data, *greedy, *TP2, size=2, output="theirs")
    assert draws(tmp_path / "theirs") == draws(tmp_path / "ours")
    assert set(results["metrics"]) == {"pass@1"} and results["evaluation"]["source"] == str(converted)
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["evaluation.json", "samples.jsonl"]
    # Taken up again, it is known for the same: nothing is drawn.
    out, _ = evaluate(tmp_path, "--hf", str(converted), *data, *greedy, output="theirs")
    assert f"{NUM_PROMPTS} of {NUM_PROMPTS} prompts are done already" in out


#: Name → (flags behind --load, message as a pattern)
BAD = {
    "k above n": ("--metrics pass@5", r"--metrics pass@5: K must lie between 1 and the 4 sample\(s\)"),
    "unknown metric": ("--metrics bleu@4", "--metrics 'bleu@4' is not known"),
    "no items": ("--eval-examples -1", "--eval-examples must be at least 0, not -1"),
    "empty file": ("--eval-data {here}/empty.jsonl", "--eval-data .*empty.jsonl is empty"),
    "no file": ("--eval-data nowhere.jsonl", "--eval-data nowhere.jsonl: No such file"),
    "greedy repeats": ("--eval-temperature 0", "--eval-samples above 1 needs --eval-temperature above 0"),
    "unknown match": ("--match fuzzy", "--match fuzzy: expected one of exact, substring"),
    "unknown rule": ("--match-rule numbers", "--match-rule numbers: expected one of auto, none"),
    "unknown flag": ("--eval-sample 3", "unknown flag --eval-sample; did you mean --eval-samples"),
    "no room": ("--rationale-budget 600", "cannot hold a prompt of 1, a rationale of 600"),
    "all overlong": ("--max-prompt-tokens 2", f"{NUM_PROMPTS} of {NUM_PROMPTS} examples exceed 2 prompt tokens"),
    "processes": ("--tensor-model-parallel-size 2", r"1 process\(es\) cannot be cut into"),
    "layout": ("--pipeline-model-parallel-size 3", r"3 does not divide num_layers \(2\)"),
    "output": ("--output /dev/null/x", "--output /dev/null/x cannot be written: Not a directory"),
    "another's output": ("--output {alone} --seed 3", r"holds another evaluation \(it differs in seed\)"),
    "two sources": ("--hf {here}", "give one of --load, --hf and --rescore, not load and hf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_every_rank_before_anything_is_drawn(name, trained, alone, tmp_path):
    flags, message = BAD[name]
    (tmp_path / "empty.jsonl").write_text("")
    flags = flags.format(here=tmp_path, alone=alone)
    argv = ["evaluate", "--load", str(trained / "checkpoints"), *AS_THE_RUN, "--device", "cpu"]
    refused(argv, ["--output", str(tmp_path / "out"), *flags.split()], message, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give one of --load, --hf and --rescore, not none"),
        ("--load {here}", "--load .*: there is no checkpoint"),
        ("--load {here}/nowhere", "--load .*nowhere: there is no such folder"),
        ("--hf {here}", "cannot read .*config.json: No such file"),
        ("--rescore {here}/nowhere", "nowhere: No such file"),
        ("--rescore {alone}/samples.jsonl --eval-samples 3", "--eval-samples is not read by evaluate --rescore: it"),
        ("--rescore {alone}/samples.jsonl --metrics maj@5", "--metrics maj@5: K must lie between 1 and the 4"),
        ("--rescore {alone}/evaluation.json", "is no file of samples"),
    ],
)
def test_a_source_that_is_none_is_refused(flags, message, alone, tmp_path):
    refused(["evaluate"], flags.format(here=tmp_path, alone=alone).split(), message, tmp_path)


def refused(argv: list[str], flags: list[str], message: str, folder: Path, size: int = 1) -> None:
    for end in run([*argv, *flags], folder, size=size):
        assert end.code == 2, end
        lines = end.err.splitlines()
        assert lines and all("megatron-jq: error: " in line for line in lines), end.err
        assert re.search(message, end.err), end.err
    assert not (folder / "out" / "samples.jsonl").exists()
