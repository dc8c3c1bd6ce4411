"""SFT's given rationales: where they are read, how they become tokens and Rollouts, and that SFT is PAFT at q = 1."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_jq.config import Config, ObjectiveConfig, RolloutConfig, parse_args, to_argv
from megatron_jq.config_validate import resolve_architecture, validate, validate_training
from megatron_jq.data.prepare import prepare
from megatron_jq.data.prompts import fingerprint
from megatron_jq.data.tokenizers import train_sentencepiece
from megatron_jq.errors import UserError
from megatron_jq.objective.garl import garl_coefficients, garl_plug_in_coefficients
from megatron_jq.objective.paft import paft_coefficients
from megatron_jq.objective.table import StepTable
from megatron_jq.records import Rollout
from megatron_jq.rollout.engine import RolloutRequest, SamplingOptions
from megatron_jq.rollout.given import GivenRationales
from megatron_jq.train.estimators import Estimator
from megatron_jq.train.setup import prepare_data

SOLUTION = "Ann sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72."
GSM8K = {"question": "How many clips did Ann sell?", "answer": f"{SOLUTION}\n#### 72"}
ROW = {"prompt": "one and one", "why": " two ones are two\n", "answer": "2"}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def datasets(path: str, tmp_path, *flags: str, estimator: str = "sft"):
    """What a run would train on."""
    config = parse_args(["--train-data", path, "--estimator", estimator, *flags, *tokenizer_flags(tmp_path)])
    return prepare_data(config, resolve_architecture(config), None, tmp_path / "run")


def tokenizer_flags(tmp_path) -> list[str]:
    model = tmp_path / "tokenizer.model"
    if not model.exists():
        train_sentencepiece([SOLUTION, "two ones are two; one and one", "so it is"], model, vocab_size=290)
    return ["--tokenizer-model", str(model)]


def read(path: str, tmp_path, *flags: str, estimator: str = "sft"):
    return datasets(path, tmp_path, "--rationale-budget", "200", *flags, estimator=estimator)


# Reading


def test_a_gsm8k_lines_worked_solution_is_its_rationale_annotations_and_all(tmp_path):
    data = read(write(tmp_path / "a.jsonl", [GSM8K] * 20), tmp_path)
    ids, tokenizer = data.train[0].rationale_ids, data.tokenizer
    assert ids[-1] == tokenizer.think_close_id and tokenizer.think_close_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == SOLUTION and data.train[0].answer_text == "72"


def test_a_named_field_is_the_rationale_of_any_format_without_blanks_at_its_ends(tmp_path):
    flags = ["--rationale-field", "why"]
    data = read(write(tmp_path / "a.jsonl", [ROW] * 20), tmp_path, *flags)
    assert data.tokenizer.decode(data.train[0].rationale_ids) == "two ones are two"
    data = read(write(tmp_path / "b.jsonl", [{**GSM8K, "why": "so it is"}] * 20), tmp_path, *flags)
    assert data.tokenizer.decode(data.train[0].rationale_ids) == "so it is"


def test_the_tokenizer_is_trained_on_rationales_too(tmp_path):
    rows = [{"prompt": "how many", "answer": "2", "why": f"{word} are so"} for word in ("quokkas", "wombats", "emus")]
    argv = ["--train-data", write(tmp_path / "a.jsonl", rows * 9), "--estimator", "sft", "--rationale-field", "why"]
    config = parse_args([*argv, "--tokenizer-vocab-size", "300"])
    data = prepare_data(config, resolve_architecture(config), None, tmp_path)
    pieces = {data.tokenizer.piece(token) for token in range(data.tokenizer.vocab_size)}
    assert {" are", "q"} <= pieces  # of a word that stands in rationales alone


@pytest.mark.parametrize("estimator", ["garl", "grpo"])
def test_other_estimators_do_not_read_rationales(estimator, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "one", "answer": "1"}] * 20)
    data = read(path, tmp_path, "--rationale-field", "why", estimator=estimator)
    assert data.train[0].rationale_ids is None


FAULTS = {
    "no such field": ([{"prompt": "one", "answer": "1"}], ["--rationale-field", "why"], "no field 'why'"),
    "empty": ([{**ROW, "why": " "}], ["--rationale-field", "why"], "field 'why' is empty"),
    "no flag": ([ROW], [], "no given rationale to imitate; name its field with --rationale-field"),
    "GSM8K's answer alone": ([{**GSM8K, "answer": "#### 72"}], [], "no worked solution stands before '####'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_record_without_a_rationale_is_named_by_file_and_line_or_dropped(name, tmp_path):
    bad, flags, words = FAULTS[name]
    good = {**(GSM8K if "GSM8K" in name else ROW)}
    rows = [good] * 20 + bad if name != "no flag" else bad * 3
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as fault:
        read(path, tmp_path, *flags)
    assert str(fault.value).startswith(f"{path}:{1 if name == 'no flag' else 21}: {words}"), fault.value
    if name != "no flag":
        assert len(read(path, tmp_path, *flags, "--bad-records", "drop").train) == 20


def test_built_in_tasks_give_no_rationale(tmp_path):
    with pytest.raises(UserError, match="--train-data builtin:sum: built-in tasks give no rationales"):
        read("builtin:sum", tmp_path)


def test_held_out_data_needs_no_rationales(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROW] * 20)
    other = write(tmp_path / "b.jsonl", [{"prompt": "one and one", "answer": "2"}])
    data = read(path, tmp_path, "--rationale-field", "why", "--eval-data", other)
    assert data.heldout[0].rationale_ids is None


def test_a_rationale_over_its_budget_close_token_included_is_refused_or_dropped(tmp_path):
    long = {**ROW, "why": "two ones are two " * 9}
    path, flags = write(tmp_path / "a.jsonl", [ROW] * 20 + [long]), ["--rationale-field", "why"]
    length = len(read(path, tmp_path, *flags).train[-1].rationale_ids)
    assert len(datasets(path, tmp_path, *flags, "--rationale-budget", str(length)).train) == 21
    flags += ["--rationale-budget", str(length - 1)]
    with pytest.raises(UserError) as fault:
        datasets(path, tmp_path, *flags)
    assert f"{path}:21 ({length} rationale tokens)" in str(fault.value)
    data = datasets(path, tmp_path, *flags, "--overlong-prompts", "drop")
    assert (len(data.train), data.dropped) == (20, 1)


def test_a_prepared_set_leaves_out_or_refuses_rationales_over_their_budget(tmp_path):
    long = {**ROW, "why": "two ones are two " * 9}
    path = write(tmp_path / "a.jsonl", [ROW] * 20 + [long])
    argv = ["--train-data", path, "--estimator", "sft", "--rationale-field", "why", "--rationale-budget", "30"]

    def made(name: str, *flags: str):
        config = parse_args([*argv, *flags, *tokenizer_flags(tmp_path)])
        return prepare(config, tmp_path / name, test_data=None, split_sizes=None, context=None)

    with pytest.raises(UserError, match=rf"{path}:21 \(\d+ rationale tokens\)"):
        made("refused")
    done = made("dropped", "--overlong-prompts", "drop")
    assert f"--train-data {path}: 1 rationale too long" in done.report
    assert len(prepare_data_from(done.folder, tmp_path).train) == 20


def test_a_prepared_set_keeps_rationales_and_one_without_is_refused(tmp_path):
    path, flags = write(tmp_path / "a.jsonl", [ROW] * 20), ["--rationale-field", "why"]
    base = ["--train-data", path, *tokenizer_flags(tmp_path), *flags]
    for name, estimator in (("with", "sft"), ("without", "garl")):
        config = parse_args([*base, "--estimator", estimator])
        prepare(config, tmp_path / name, test_data=None, split_sizes=None, context=None)
    straight = read(path, tmp_path, *flags)
    kept = prepare_data_from(tmp_path / "with", tmp_path)
    assert [e.rationale_ids for e in kept.train] == [e.rationale_ids for e in straight.train]
    assert kept.fingerprint == straight.fingerprint
    with pytest.raises(UserError, match="was prepared without rationales; prepare it again with --estimator sft"):
        prepare_data_from(tmp_path / "without", tmp_path)


def prepare_data_from(folder, tmp_path):
    config = parse_args(["--train-data", str(folder), "--estimator", "sft"])
    return prepare_data(config, resolve_architecture(config), None, tmp_path / "run")


def test_a_run_on_other_rationales_is_a_run_on_other_data(tmp_path):
    rows = [ROW, {**ROW, "why": "three ones are two"}]
    data = read(write(tmp_path / "a.jsonl", rows * 10), tmp_path, "--rationale-field", "why")
    one, other = data.train[:2]
    assert one.prompt_ids == other.prompt_ids and one.answer_ids == other.answer_ids
    assert fingerprint([one]) != fingerprint([other])


# The engine


def test_the_engine_returns_what_it_is_given_all_of_it_weighted():
    options = SamplingOptions(4, 0, 1.0, 1.0, close_id=1, eos_id=2, seed=0, step=0)
    requests = [RolloutRequest(3, (9, 9), (0,), given_ids=(7, 8, 1)), RolloutRequest(0, (9,), (0,), given_ids=())]
    assert GivenRationales().generate(requests, options) == [Rollout(3, 0, (7, 8, 1), 3), Rollout(0, 0, (), 0)]


# Coefficients

LOG_W = st.lists(st.floats(-900, 0), min_size=1, max_size=5)


@given(LOG_W)
def test_sft_is_paft_at_q_1_with_the_given_rationale_as_its_one_draw(log_w):
    """One proposal: its posterior weight is 1 whatever w is, and the attenuation w̄^(1-q) is 1. M = 1, K = 1."""
    log_w_B1 = torch.tensor(log_w, dtype=torch.float64)[:, None]
    valid_B1 = torch.ones_like(log_w_B1, dtype=torch.bool)
    sft, paft = (
        Estimator(name, 1, True, 5).coefficients(StepTable(log_w_B1, valid_B1), q=1.0, step=0)
        for name in ("sft", "paft")
    )
    assert torch.equal(sft.rationale_BM, paft.rationale_BM) and torch.equal(sft.answer_BM, paft.answer_BM)
    assert sft.answer_BM.tolist() == [[1 / len(log_w)]] * len(log_w)
    # GARL's plug-in weight w / w̄^q is the same 1; its baseline would need a second rationale.
    assert torch.equal(garl_plug_in_coefficients(log_w_B1, 1.0), torch.ones_like(log_w_B1))
    assert garl_coefficients(log_w_B1, 1.0)[0].count_nonzero() == 0


def test_below_q_1_sft_and_paft_part():
    log_w_B1 = torch.tensor([[-1.0]], dtype=torch.float64)
    joint = paft_coefficients(log_w_B1, 0.5, 1, generator=torch.Generator().manual_seed(0))
    assert joint.item() == pytest.approx(torch.tensor(-0.5).exp().item())


def test_pretraining_is_sft_a_token():
    unread = torch.full((4, 1), torch.nan)
    table = StepTable(unread, torch.ones(4, 1, dtype=torch.bool), reward_BM=unread)
    sft = Estimator("sft", 1, True, 5).coefficients(table, q=0.3, step=1)
    rows = Estimator("pretrain", 1, True, 5, row_tokens=8).coefficients(table, q=0.3, step=1)
    assert torch.equal(sft.answer_BM, rows.answer_BM * 8) and rows.answer_BM.sum() == 1 / 8


# Settings


@pytest.mark.parametrize("estimator", ["sft", "pretrain"])
def test_one_rationale_is_understood_and_another_number_refused(estimator):
    config = parse_args(["--estimator", estimator])
    assert config.rollout.num_rationales == 1 and parse_args(to_argv(config)) == config
    with pytest.raises(UserError, match=f"--num-rationales must be 1 for --estimator {estimator}"):
        validate(parse_args(["--estimator", estimator, "--num-rationales", "4"]), 1)
    made = Config(objective=ObjectiveConfig(estimator=estimator), rollout=RolloutConfig(num_rationales=8))
    with pytest.raises(UserError, match="--num-rationales must be 1"):
        validate(made, 1)


PRETRAIN = ["--estimator", "pretrain", "--data-path", "p", "--tokenizer-model", "m"]
REFUSED = {
    "--data-path is for --estimator pretrain alone, not garl": ["--data-path", "p"],
    "--split is for --estimator pretrain alone, not sft": ["--estimator", "sft", "--split", "1,1"],
    "--seq-length is for": ["--seq-length", "8"],
    "--data-cache-path is for": ["--data-cache-path", "p"],
    "--estimator pretrain needs --data-path": ["--estimator", "pretrain", "--tokenizer-model", "m"],
    "--estimator pretrain needs --tokenizer-model": ["--estimator", "pretrain", "--data-path", "p"],
    "--seq-length 513 exceeds the model's context of 512": [*PRETRAIN, "--seq-length", "513"],
    "--seq-length must be at least 1": [*PRETRAIN, "--seq-length", "0"],
    "--max-tokens-per-micro-batch 8 is below a row of 9": [
        *PRETRAIN, "--seq-length", "8", "--max-tokens-per-micro-batch", "8"
    ],
    "--keep-best eval_exact_match is not known in pretraining": [
        *PRETRAIN, "--keep-best", "eval_exact_match", "--keep-last", "1"
    ],
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_belong_together_are_refused(words):
    with pytest.raises(UserError, match=words):
        validate_training(parse_args(REFUSED[words]), 1)


def test_a_row_may_fill_the_context_whatever_the_budgets_for_answers_say():
    validate(parse_args([*PRETRAIN, "--seq-length", "512", "--rationale-budget", "9999", "--eval-interval", "5"]), 1)
