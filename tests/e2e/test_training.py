"""Short runs through the whole command line: what they leave behind, and that no layout changes it."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_jq.config import load_toml, parse_args
from megatron_jq.data.tokenizers import SentencePieceTokenizer
from megatron_jq.records import StepMetrics
from tests.e2e.launch import SMALL, finish, run, start_torchrun

#: Keys of metrics.jsonl that users read: numbers in every line of a GARL run.
DOCUMENTED = (
    "step q loss log_p_mean p_mean effective_reward_max ess_mean grad_norm lr num_rationales_valid "
    "rationale_tokens_mean forced_fraction tokens_trained seconds_rollout seconds_score seconds_train peak_memory_bytes"
).split()
LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2": [],
}


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def train(folder: Path, *flags: str, size: int = 1) -> list[dict]:
    """The metrics of a run that ends well."""
    folder.mkdir(exist_ok=True)
    ended = run([*SMALL, "--run-dir", str(folder / "run"), *flags], folder, size=size)
    assert [end.code for end in ended] == [0] * size, ended
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run folder of SMALL on one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder)
    return folder / "run"


def assert_same_training(lines: list[dict], reference: list[dict]) -> None:
    assert len(lines) == len(reference) == 3
    for ours, theirs in zip(lines, reference, strict=True):
        for key in ("loss", "log_p_mean", "p_mean", "effective_reward_max", "ess_mean", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)
        for key in ("step", "q", "lr", "num_rationales_valid", "rationale_tokens_mean", "tokens_trained"):
            assert ours[key] == theirs[key], (ours["step"], key)
    assert lines[-1]["eval_exact_match"] == reference[-1]["eval_exact_match"]


def test_metrics_hold_the_documented_keys_and_finite_numbers(alone):
    lines = metrics(alone)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert list(line) == [field.name for field in fields(StepMetrics)]
        assert set(DOCUMENTED) <= set(line)
        assert all(math.isfinite(line[key]) for key in DOCUMENTED)
        assert line["num_rationales_valid"] == 16 and 1 <= line["ess_mean"] <= 4
        assert line["log_prob_mismatch_max"] < 1e-4
        # Scored and trained once each, a prompt once for its four rationales: no copy of it counts.
        assert line["tokens_computed"] == 2 * line["tokens_trained"] and line["tokens_saved"] > 0
    # No update of this size makes things worse on the very task, from a start this cold.
    assert lines[2]["log_p_mean"] > lines[0]["log_p_mean"] + 0.5


def test_the_held_out_examples_are_evaluated_at_the_end_and_on_request(alone, tmp_path):
    assert [line["eval_exact_match"] for line in metrics(alone)] == [None, None, 0.0]
    asked = train(tmp_path, "--eval-interval", "2", "--no-tensorboard")
    assert [line["eval_exact_match"] for line in asked] == [None, 0.0, 0.0]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_run_folder_holds_its_settings_and_its_tokenizer(alone):
    argv = [*SMALL[1:], "--run-dir", str(alone)]
    assert load_toml(alone / "config.toml") == parse_args(argv)
    tokenizer = SentencePieceTokenizer(alone / "tokenizer.model")
    text = "the kettle of Greta is purple today ."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tensorboard_shows_the_same_numbers(alone):
    events = EventAccumulator(str(alone / "tensorboard")).Reload()
    lines = metrics(alone)
    for key in ("loss", "log_p_mean", "grad_norm", "effective_reward_max"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        assert shown == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]


def test_the_same_command_repeats_the_same_training(alone, tmp_path):
    again, before = train(tmp_path), metrics(alone)
    for key in ("loss", "log_p_mean", "grad_norm", "tokens_trained"):
        assert [line[key] for line in again] == [line[key] for line in before]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_training(layout, alone, tmp_path):
    assert_same_training(train(tmp_path, *LAYOUTS[layout], size=2), metrics(alone))


def test_replicas_without_a_rationale_change_nothing(tmp_path):
    """One sequence a step on two replicas: the first, whose rank 0 shows samples, has none to show."""
    flags = ["--estimator", "paft", "--prompts-per-step", "1", "--num-rationales", "1", "--sample-interval", "1"]
    assert_same_training(train(tmp_path / "two", *flags, size=2), train(tmp_path / "one", *flags))


def test_torchrun_trains_the_same_with_tensor_parallel_ranks(alone, tmp_path):
    run_dir = tmp_path / "run"
    ended = finish(start_torchrun([*SMALL, "--run-dir", str(run_dir), *LAYOUTS["TP2"]], 2))
    assert ended.code == 0, ended.err
    assert_same_training(metrics(run_dir), metrics(alone))
    assert "TP 2 PP 1 DP 1 on cpu" in ended.out and "step 3/3 | ln P -" in ended.out


@pytest.mark.parametrize("estimator", ["garl", "paft", "grpo", "rloo", "maxrl"])
def test_every_estimator_trains_from_the_same_start(estimator, alone, tmp_path):
    lines = train(tmp_path, *LAYOUTS["TP2"], "--estimator", estimator, "--train-iters", "2", size=2)
    assert len(lines) == 2
    assert lines[0]["log_p_mean"] == pytest.approx(metrics(alone)[0]["log_p_mean"], rel=1e-6)
    baseline = estimator in ("grpo", "rloo", "maxrl")
    for line in lines:
        assert all(line[key] is not None for key in DOCUMENTED if key != "q" or not baseline)
        assert line["q"] == (None if baseline else 0.75)
        # No answer of nine words is right by chance: the baselines have nothing to learn from, GARL and PAFT do.
        assert line["reward_mean"] == (0.0 if baseline else None)
        assert (line["grad_norm"] == 0) == baseline


def test_bf16_with_the_distributed_optimizer_trains_close_to_float32(alone, tmp_path):
    lines, reference = train(tmp_path, "--bf16", "--use-distributed-optimizer", size=2), metrics(alone)
    # bfloat16 holds 8 bits of each of the nine answer tokens' logits
    assert lines[0]["log_p_mean"] == pytest.approx(reference[0]["log_p_mean"], abs=0.5)
    assert lines[2]["log_p_mean"] > lines[0]["log_p_mean"] + 0.5
    assert all(math.isfinite(line[key]) for line in lines for key in DOCUMENTED)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--q-schedule step --q 1 --q-final 0 --q-schedule-iters 2", [1, 1, 0, 0]),
        ("--q-schedule linear --q 1 --q-final 0.25 --q-schedule-iters 3", [1, 0.75, 0.5, 0.25]),
    ],
)
def test_the_q_of_each_step_is_the_schedules(flags, expected, tmp_path):
    lines = train(tmp_path, *flags.split(), "--train-iters", "4")
    assert [line["q"] for line in lines] == pytest.approx(expected)


def test_a_file_of_prompts_trains_with_its_own_tokenizer_and_held_out_file(tmp_path):
    pairs = [(f"what is {a} and {b}", str(a + b)) for a in range(8) for b in range(8)]
    for name, some in {"train": pairs[::2], "test": pairs[1::16]}.items():
        text = "".join(json.dumps({"x": prompt, "y": answer}) + "\n" for prompt, answer in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = ["--train-data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl")]
    lines = train(tmp_path, *files, "--prompt-field", "x", "--answer-field", "y", "--tokenizer-vocab-size", "280")
    assert lines[2]["log_p_mean"] > lines[0]["log_p_mean"] and lines[2]["eval_exact_match"] is not None
