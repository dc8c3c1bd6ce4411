"""pretrain → sft → garl, each from the last one's checkpoint, in one program; and what is the same computation by two
names: a run that was stopped, another layout, a schedule of q in two commands.
"""

import json
import math
import os
import re
import resource
import signal
from pathlib import Path

import numpy
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from examples.stages.make_data import main as make_data
from megatron_jq.checkpoint.folder import find
from megatron_jq.config import parse_args
from megatron_jq.config_validate import validate
from megatron_jq.corpus import reading
from megatron_jq.corpus.reading import Rows
from megatron_jq.data.tokenizers import train_sentencepiece
from megatron_jq.train.imitation import Imitation
from megatron_jq.train.pretraining import Batch
from tests.e2e.launch import Ranks, run
from tests.e2e.test_resume import metrics as compared
from tests.e2e.test_training import metrics
from tools.preprocess_data import main as preprocess

EXAMPLE = Path(__file__).parents[2] / "examples" / "stages"
QUIET = ["--sample-interval", "0", "--device", "cpu", "--no-tensorboard"]
BUDGET = ["--rationale-budget", "24", "--answer-budget", "8"]


def train(folder: Path, name: str, *flags: str, size: int = 1) -> Path:
    """The run's directory, once it ended well."""
    ended = run(["train", *QUIET, "--run-dir", str(folder / name), *flags], folder, size=size)
    assert [end.code for end in ended] == [0] * size, ended
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text, problems in GSM8K's format, and the text's indexed files with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("stages")
    make_data(str(folder))
    flags = ["--output-prefix", f"{folder}/corpus", "--append-eod", "--tokenizer-vocab-size", "384"]
    assert preprocess(["--input", f"{folder}/corpus.jsonl", *flags]) == 0
    return folder


def pretraining(folder: Path, steps: int = 30) -> list[str]:
    return [
        "--estimator", "pretrain", "--data-path", f"{folder}/corpus_text_document", "--seq-length", "64",
        "--tokenizer-model", f"{folder}/corpus.tokenizer.model", "--prompts-per-step", "8", "--lr", "5e-3",
        "--train-iters", str(steps), "--eval-examples", "8",
    ]  # fmt: skip


def problems(folder: Path, steps: int, *flags: str) -> list[str]:
    return [
        "--train-data", f"{folder}/train.jsonl", "--eval-data", f"{folder}/test.jsonl", "--eval-examples", "8",
        "--prompts-per-step", "8", "--train-iters", str(steps), *BUDGET, *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def chain(folder) -> dict[str, Path]:
    pretrain = train(folder, "pretrain", *pretraining(folder), "--eval-interval", "15")
    load = ["--finetune", "--load"]
    sft = train(
        folder, "sft", "--estimator", "sft", *problems(folder, 20, "--lr", "3e-3"), *load, f"{pretrain}/checkpoints"
    )
    flags = ["--num-rationales", "4", "--lr", "1e-3", *load, f"{sft}/checkpoints"]
    garl = train(folder, "garl", "--estimator", "garl", *problems(folder, 3), *flags)
    return {"pretrain": pretrain, "sft": sft, "garl": garl}


def mean(lines: list[dict], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def test_each_stages_loss_falls_from_where_the_last_one_ended(chain):
    pretrain, sft, garl = (metrics(chain[name]) for name in ("pretrain", "sft", "garl"))
    vocabulary = 384
    assert pretrain[0]["loss"] == pytest.approx(math.log(vocabulary), rel=0.1)  # nats a token, of random weights
    assert mean(pretrain[-3:], "loss") < 0.6 * pretrain[0]["loss"]
    losses = {line["step"]: line["eval_loss"] for line in pretrain if line["eval_loss"] is not None}
    assert list(losses) == [14, 29] and losses[29] < losses[14] < pretrain[0]["loss"]
    assert mean(sft[-3:], "loss") < 0.5 * sft[0]["loss"]
    assert all(line["eval_exact_match"] is None for line in pretrain)
    assert sft[-1]["eval_exact_match"] is not None
    # The answer's share of SFT's loss is what GARL's prompts begin with, give or take other prompts and drawn z.
    assert garl[0]["log_p_mean"] > sft[0]["log_p_mean"] + 2.0


def test_a_stage_begins_at_the_weights_of_the_one_before(chain, folder):
    """Without an update between: what pretraining leaves scores the next stage's first batch as that stage does."""
    begun = metrics(chain["sft"])[0]
    again = train(
        folder, "sft-again", "--estimator", "sft", *problems(folder, 1, "--lr", "0"),
        "--load", f"{chain['pretrain']}/checkpoints", "--finetune",
    )  # fmt: skip
    untrained = train(
        folder, "sft-random", "--estimator", "sft", *problems(folder, 1, "--lr", "0"),
        "--tokenizer-model", f"{folder}/corpus.tokenizer.model",
    )  # fmt: skip
    assert metrics(again)[0]["loss"] == begun["loss"] < 0.7 * metrics(untrained)[0]["loss"]
    states = [weights(find(path / "checkpoints")) for path in (chain["pretrain"], again)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 10
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, read by torch's own reader."""
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(("optimizer", "rng"))
    }
    load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def test_every_metric_of_the_imitating_stages_is_what_it_says(chain):
    for name, tokens in (("pretrain", 8 * 65), ("sft", None)):
        for line in metrics(chain[name]):
            assert line["q"] is None and line["reward_mean"] is None and line["log_prob_mismatch_max"] is None
            assert line["num_rationales_valid"] == 8 and line["forced_fraction"] == 0.0 and line["ess_mean"] == 1.0
            assert tokens is None or line["tokens_trained"] == tokens
            scored = line["tokens_computed"] - line["tokens_trained"]
            assert scored == 0, "no pass before the training pass"
    first = metrics(chain["pretrain"])[0]
    assert first["loss"] == pytest.approx(-first["log_p_mean"] / 64)


@pytest.mark.parametrize("estimator", ["pretrain", "sft"])
def test_a_run_that_stops_goes_on_exactly_and_at_any_number_of_replicas(estimator, folder, chain, tmp_path):
    flags = {
        "pretrain": pretraining(folder, 8),
        "sft": ["--estimator", "sft", *problems(folder, 8), "--load", f"{chain['pretrain']}/checkpoints", "--finetune"],
    }[estimator]
    uninterrupted = train(tmp_path, "whole", *flags, "--save-interval", "4")
    # The corpus is read less than once: a shorter run's rows are the longer one's first.
    train(tmp_path, "part", *flags, "--train-iters", "4")
    again = train(tmp_path, "part", *flags, "--resume")
    lines = [[json.loads(line) for line in compared(path)] for path in (uninterrupted, again)]
    for line in lines[1][3], lines[0][3]:  # the shorter run was also evaluated at its own end
        line.update(dict.fromkeys(("eval_loss", "eval_exact_match", "eval_pass_at_k", "eval_maj_at_k")))
    assert lines[0] == lines[1] and len(lines[0]) == 8
    two = train(tmp_path, "two", *flags, size=2)
    for ours, wanted in zip(metrics(two), metrics(uninterrupted), strict=True):
        for key in ("loss", "log_p_mean", "grad_norm"):
            assert ours[key] == pytest.approx(wanted[key], rel=1e-4), key
        assert ours["tokens_trained"] == wanted["tokens_trained"]
    key = {"pretrain": "eval_loss", "sft": "eval_exact_match"}[estimator]
    assert metrics(two)[-1][key] == pytest.approx(metrics(uninterrupted)[-1][key], rel=1e-4)


def test_a_longer_run_that_reads_its_files_again_is_refused_with_the_flags_that_did_it(folder, tmp_path):
    flags = [*pretraining(folder, 1), "--eval-examples", "1"]
    run_dir = train(tmp_path, "short", *flags)
    (end,) = run(["train", *QUIET, *flags, "--run-dir", str(run_dir), "--resume", "--train-iters", "2000"], tmp_path)
    assert end.code == 2, end
    assert "was trained on other data than --data-path (and --train-iters, where files are read more than" in end.err
    elsewhere = ["--train-iters", "2", "--data-cache-path", str(tmp_path / "cache")]
    assert len(metrics(train(tmp_path, "short", *flags, "--resume", *elsewhere))) == 2


def test_a_pretrained_policy_is_evaluated_on_the_data_that_is_named(chain, folder, tmp_path):
    argv = ["evaluate", "--device", "cpu", "--load", f"{chain['pretrain']}/checkpoints", "--output", f"{tmp_path}/out"]
    (end,) = run(argv, tmp_path)
    assert end.code == 2 and "--eval-data is missing" in end.err, end
    few = ["--eval-examples", "2", "--eval-samples", "2"]
    (end,) = run([*argv, "--eval-data", f"{folder}/test.jsonl", *few, *BUDGET], tmp_path)
    assert end.code == 0, end
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["evaluation"]["num_prompts"] == 2 and results["log_p_mean"]["value"] < 0


def test_sft_then_rlvr_as_a_q_schedule_is_two_runs_with_the_optimizer_carried_on(tmp_path):
    """--q 1 --q-schedule step --q-final 0 is q = 1 to the step, and from its checkpoint q = 0: one computation."""
    common = ["--estimator", "garl", "--prompts-per-step", "4", "--num-rationales", "4", "--rationale-budget", "4",
              "--train-examples", "32", "--eval-examples", "4"]  # fmt: skip
    schedule = ["--q", "1", "--q-schedule", "step", "--q-final", "0", "--q-schedule-iters", "3", "--train-iters", "6"]
    single = train(tmp_path, "one", *common, *schedule)
    first = train(tmp_path, "first", *common, "--q", "1", "--train-iters", "3")
    then = train(tmp_path, "then", *common, "--q", "0", "--train-iters", "6", "--load", f"{first}/checkpoints")
    lines = [json.loads(line) for line in [*compared(first), *compared(then)]]
    expected = [json.loads(line) for line in compared(single)]
    assert [line["q"] for line in lines] == [line["q"] for line in expected] == [1.0] * 3 + [0.0] * 3
    for ours, wanted in zip(lines, expected, strict=True):
        for key in ("step", "loss", "log_p_mean", "grad_norm", "rationale_tokens_mean"):
            assert ours[key] == wanted[key], (ours["step"], key)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "garl"])
def test_the_examples_settings_are_valid(stage):
    files = ["--data-path", "p", "--tokenizer-model", "m"] if stage == "pretrain" else []
    config = parse_args(["--config", f"{EXAMPLE}/{stage}.toml", *files])
    validate(config, 1)
    assert config.objective.estimator == stage


# Rows that each replica reads by itself


def note_rows(folder: Path):
    """A `prepare` that has each rank write down which rows it reads; row 0 comes first, at set-up."""

    def prepare(rank: int) -> None:
        read = Rows.__getitem__

        def noted(self, index: int):
            with open(folder / f"rows.{rank}", "a") as file:
                file.write(f"{index}\n")
            return read(self, index)

        Rows.__getitem__ = noted

    return prepare


def read_everything(rank: int) -> None:
    """Every rank reads all rows of a batch, whoever trains on them."""
    begin = Batch.__init__

    def eager(self, examples, indices):
        begin(self, examples, indices)
        list(self)

    Batch.__init__ = eager


def test_a_replica_reads_the_rows_that_it_trains_on_and_all_numbers_are_the_same(folder, tmp_path):
    flags = [*pretraining(folder, 3), "--eval-interval", "3"]
    argv = ["train", *QUIET, *flags, "--run-dir"]
    for name, prepare in (("own", note_rows(tmp_path)), ("all", read_everything)):
        ended = run([*argv, str(tmp_path / name)], tmp_path, size=2, prepare=prepare)
        assert [end.code for end in ended] == [0, 0], ended
    assert compared(tmp_path / "own") == compared(tmp_path / "all")
    for rank in (0, 1):
        rows = [int(line) for line in (tmp_path / f"rows.{rank}").read_text().split()]
        steps = [[8 * step + 4 * rank + i for i in range(4)] for step in range(3)]
        assert rows == [0, *steps[0], *steps[1], *steps[2], *range(4 * rank, 4 * rank + 4)]  # the last: validation


def test_a_bad_row_that_one_replica_meets_ends_all_of_them(folder, tmp_path):
    def blind(rank: int) -> None:
        if rank == 1:
            step = Imitation.step

            def last(self, number: int):
                self.data.train._vocab_size = 3 if number == 1 else 384
                return step(self, number)

            Imitation.step = last

    argv = ["train", *QUIET, *pretraining(folder), "--run-dir", str(tmp_path / "run")]
    ended = run(argv, tmp_path, size=2, prepare=blind)
    assert [end.code for end in ended] == [2, 2], ended
    assert len({end.err.partition("error: ")[2] for end in ended}) == 1 and "holds token" in ended[0].err


def test_documents_ends_are_no_part_of_the_loss_at_any_number_of_replicas(folder, chain, tmp_path):
    flags = [*pretraining(folder, 4), "--eod-mask-loss", "--reset-attention-mask"]
    single, two = train(tmp_path, "one", *flags), train(tmp_path, "two", *flags, size=2)
    plain = metrics(chain["pretrain"])
    for ours, wanted, other in zip(metrics(two), metrics(single), plain, strict=False):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert ours["log_p_mean"] > -64 * ours["loss"], "fewer than 64 tokens of a row are scored"
        assert ours["loss"] != pytest.approx(other["loss"], rel=1e-4)
    assert metrics(two)[-1]["eval_loss"] == pytest.approx(metrics(single)[-1]["eval_loss"], rel=1e-4)
    refused = train_again(tmp_path, single, *pretraining(folder, 5), "--reset-attention-mask")
    assert "--eod-mask-loss was True and is False" in refused


def train_again(folder: Path, run_dir: Path, *flags: str) -> str:
    """What a run is told that may not be taken up so."""
    (end,) = run(["train", *QUIET, *flags, "--run-dir", str(run_dir), "--resume"], folder)
    assert end.code == 2, end
    return end.err


# The sample indices' folder


def limit_indices(rank: int) -> None:
    """No room for a file of more than 150 bytes while the indices are written."""
    write = reading._write_indices

    def limited(*arguments):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    reading._write_indices = limited


def leave(rank: int) -> None:
    if rank == 1:
        os.chdir("elsewhere")


CACHES = {
    "--data-cache-path cache cannot be written: ": limit_indices,
    r"--data-cache-path: the sample indices in cache/\w+ cannot be read on \S+: .*No such file": leave,
}


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("words", CACHES)
def test_indices_that_one_rank_cannot_write_or_read_end_all_of_them(words, blend, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    argv = ["train", *QUIET, *pretraining(folder, 1), "--run-dir", str(tmp_path / "run"), "--data-cache-path", "cache"]
    if blend:
        argv += ["--data-path", f"1 {folder}/corpus_text_document 1 {folder}/corpus_text_document"]
    ended = run(argv, tmp_path, size=2, prepare=CACHES[words])
    for rank, end in enumerate(ended):
        assert end.code == 2 and re.fullmatch(rf"\[rank {rank}\] megatron-jq: error: {words}.*\n", end.err), end
    if CACHES[words] is limit_indices:
        assert list(Path("cache").iterdir()) == []
    assert [end.code for end in run(argv, tmp_path, size=2)] == [0, 0]


def test_a_run_that_was_killed_while_it_wrote_its_indices_begins_again(folder, tmp_path):
    def kill_in_the_second_file(rank: int) -> None:
        save, saved = numpy.save, []

        def dying(path, array, **keywords):
            saved.append(path)
            if len(saved) == 2:
                Path(path).write_bytes(b"\x93NUMPY")
                os.kill(os.getpid(), signal.SIGKILL)
            save(path, array, **keywords)

        numpy.save = dying

    argv = ["train", *QUIET, *pretraining(folder, 1), "--run-dir", str(tmp_path / "run")]
    assert run(argv, tmp_path, prepare=kill_in_the_second_file)[0].code == -signal.SIGKILL
    (end,) = run(argv, tmp_path)
    assert end.code == 0, end


BAD = {
    "--data-path {}/none: there is no {}/none.idx": ["--data-path", "{}/none"],
    "holds token": ["--tokenizer-model", "{}/small.model"],
    "leaves no row of 65 tokens": ["--split", "100,0,0", "--eval-interval", "5"],
    "fewer than a row of 401": ["--split", "1,1999", "--seq-length", "400"],
    "--train-data is not read by --estimator pretrain": ["--train-data", "builtin:addition"],
    "--eval-data is not read by --estimator pretrain": ["--eval-data", "{}/test.jsonl"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_ends_the_run_with_one_line_on_all_ranks(words, folder, tmp_path):
    train_sentencepiece(["the cat sat on a mat"] * 9, folder / "small.model", vocab_size=275)
    flags = [flag.format(folder) for flag in BAD[words]]
    ranks = Ranks(["train", *QUIET, *pretraining(folder), "--run-dir", str(tmp_path / "run"), *flags], tmp_path, size=2)
    ended = ranks.ended()
    assert [end.code for end in ended] == [2, 2], ended
    assert words.format(folder, folder) in ended[0].err and "Traceback" not in ended[0].err + ended[1].err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_set_without_rationales_is_refused_under_sft(folder, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "one and one", "answer": "2"}\n')
    ended = run(["train", *QUIET, "--estimator", "sft", "--train-data", str(path), "--run-dir", str(tmp_path / "r"),
                 "--prompts-per-step", "1"], tmp_path)  # fmt: skip
    assert ended[0].code == 2 and f"{path}:1: no given rationale to imitate" in ended[0].err
