"""GRPO with several updates a rollout and a KL to the policy it began with, through the whole command line."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_jq.checkpoint import folder as folders
from megatron_jq.records import MEASURED
from megatron_jq.train import rollouts
from tests.e2e.launch import SMALL, Ended, run

KL = ["--estimator", "grpo", "--grpo-kl-beta", "0.05", "--no-tensorboard"]
#: Narrow bounds: an update of a run this short and cold moves little.
TWICE = [*KL, "--grpo-iterations", "2", "--grpo-clamp-eps-lower", "0.01", "--grpo-clamp-eps-upper", "0.01"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]


def lottery(rank: int) -> None:
    """Every other answer is right: an untrained policy's never are, and there would be nothing to train on."""
    rollouts.answer_matches = lambda ids, example, tokenizer: sum(ids) % 2 == 0


def metrics(run_dir: Path) -> list[dict]:
    """Without times and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def ended(folder: Path, *flags: str, size: int = 1, prepare=lottery) -> list[Ended]:
    folder.mkdir(exist_ok=True)
    argv = [*SMALL, "--run-dir", str(folder / "run"), "--train-iters", "6", *flags]
    return run(argv, folder, size=size, prepare=prepare)


def train(folder: Path, *flags: str, size: int = 1, prepare=lottery) -> list[dict]:
    """The metrics of a run that ends well."""
    found = ended(folder, *flags, size=size, prepare=prepare)
    assert [end.code for end in found] == [0] * size, found
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Path:
    """A folder with the run of TWICE on one process."""
    folder = tmp_path_factory.mktemp("twice")
    train(folder, *TWICE, "--save-interval", "2")
    return folder


def test_the_kl_to_the_start_grows_from_0_and_tokens_are_clipped(twice):
    lines = metrics(twice / "run")
    kl = [line["kl_reference_mean"] for line in lines]
    assert kl[0] == 0.0 and kl[1] > 1e-3 and kl[-1] > 2 * kl[1], kl
    assert all(0 < line["clipped_fraction"] < 0.5 for line in lines), lines
    assert all(0.2 < line["reward_mean"] < 0.8 and line["grad_norm"] > 0 for line in lines)
    # Score once; then a pass of the reference and two updates.
    assert all(line["tokens_computed"] > 3 * line["tokens_trained"] / 2 for line in lines)


def test_settings_that_change_nothing_leave_the_run_as_it_is(tmp_path):
    """One update per rollout: the ratio is 1, whatever bounds a file holds (flags for them are refused), and without a
    penalty there is no reference.
    """
    plain = train(tmp_path / "plain", "--estimator", "grpo", "--no-tensorboard")
    small, bounds = Path(SMALL[SMALL.index("--config") + 1]), tmp_path / "bounds.toml"
    lines = ["grpo_clamp_eps_lower = 0.0", "grpo_clamp_eps_upper = 0.0", small.read_text(encoding="utf-8")]
    bounds.write_text("\n".join(lines), encoding="utf-8")
    argv = [str(bounds) if word == str(small) else word for word in SMALL]
    flags = ["--estimator", "grpo", "--no-tensorboard", "--train-iters", "6", "--run-dir", str(tmp_path / "run")]
    assert [end.code for end in run([*argv, *flags], tmp_path, prepare=lottery)] == [0]
    assert metrics(tmp_path / "run") == plain
    assert {(line["kl_reference_mean"], line["clipped_fraction"]) for line in plain} == {(None, None)}
    assert not (tmp_path / "plain" / "run" / "checkpoints" / "reference").exists()


def test_the_learning_rate_counts_steps_and_not_updates(tmp_path):
    decay = ["--lr-decay-style", "linear", "--lr", "0.006", "--lr-decay-iters", "6"]
    rates = [[line["lr"] for line in train(tmp_path / n, *KL, *decay, "--grpo-iterations", n)] for n in ("1", "3")]
    assert rates[0] == rates[1] == pytest.approx([0.006 * (1 - step / 7) for step in range(1, 7)])


def test_without_rewards_the_penalty_alone_moves_nothing(tmp_path):
    lines = train(tmp_path, *TWICE, size=2, prepare=None)
    assert {(line["grad_norm"], line["kl_reference_mean"], line["reward_mean"]) for line in lines} == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize("layout", [TP2, PP2, []], ids=["TP2", "PP2", "DP2"])
def test_the_layout_does_not_change_the_training(layout, twice, tmp_path):
    lines = train(tmp_path, *TWICE, "--max-tokens-per-micro-batch", "96", *layout, size=2)
    for ours, theirs in zip(lines[:4], metrics(twice / "run"), strict=False):
        for key in ("loss", "log_p_mean", "grad_norm", "kl_reference_mean"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-6), (ours["step"], key)
        assert ours["lr"] == theirs["lr"] and ours["reward_mean"] == theirs["reward_mean"]


def cut_back(source: Path, target: Path, step: int) -> None:
    """The run as it was when it had saved `step`."""
    shutil.copytree(source, target)
    save = target / "run" / "checkpoints"
    for path in save.glob("iter_*"):
        if folders.step_of(path) > step:
            shutil.rmtree(path)
    (save / folders.TRACKER).write_text(f"{step}\n")


def test_a_run_that_is_taken_up_again_keeps_the_reference_of_its_first_start(twice, tmp_path):
    cut_back(twice, tmp_path / "again", 2)
    assert train(tmp_path / "again", *TWICE, "--save-interval", "2", "--resume") == metrics(twice / "run")


def test_another_layout_takes_a_run_and_its_reference_up(twice, tmp_path):
    cut_back(twice, tmp_path / "again", 2)
    lines = train(tmp_path / "again", *TWICE, "--save-interval", "2", "--resume", *TP2, size=2)
    before = metrics(twice / "run")
    assert lines[:2] == before[:2]
    for key in ("kl_reference_mean", "loss", "grad_norm"):
        assert lines[2][key] == pytest.approx(before[2][key], rel=1e-3), key


def test_without_the_first_starts_reference_a_run_is_not_taken_up_again(twice, tmp_path):
    cut_back(twice, tmp_path / "again", 2)
    shutil.rmtree(tmp_path / "again" / "run" / "checkpoints" / "reference")
    [end] = ended(tmp_path / "again", *TWICE, "--save-interval", "2", "--resume")
    assert end.code == 2 and len(end.err.splitlines()) == 1, end.err
    assert "needs the policy that the run began with" in end.err and "checkpoints/reference does not hold it" in end.err


def test_a_run_from_another_ones_weights_is_held_to_those(twice, tmp_path):
    source = str(twice / "run" / "checkpoints")
    lines = train(
        tmp_path / "next", *KL, "--load", source, "--finetune", "--train-iters", "2", "--train-examples", "64"
    )
    assert lines[0]["kl_reference_mean"] == 0.0 and lines[1]["kl_reference_mean"] > 0
    assert all(line["clipped_fraction"] is None for line in lines)  # one update: nothing to clip


def test_a_bf16_run_with_the_distributed_optimizer_begins_at_its_reference_too(tmp_path):
    flags = [*TWICE, "--bf16", "--use-distributed-optimizer", "--train-iters", "3"]
    kl = [line["kl_reference_mean"] for line in train(tmp_path, *flags, size=2)]
    assert kl[0] == 0.0 and 0 < kl[1] < kl[2]
