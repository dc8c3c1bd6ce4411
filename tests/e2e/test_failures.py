"""Runs that cannot go on: numbers that are not finite, and ranks that die, hang or never come."""

import json
import os
import re
import resource
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_jq.data.sampler import PromptSampler
from megatron_jq.errors import PeerFailure, RunFailure
from megatron_jq.train.failures import Phase, peers_must_answer
from megatron_jq.train.trainer import Trainer
from tests.e2e.launch import SMALL, Ranks, finish, kill, run, start_torchrun, wait_for_steps, worker_codes, workers

LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2": [],
}
ENDLESS = ["--train-iters", "1000000"]
DEADLINE_SECONDS = 12.0  # long enough for two ranks of a busy machine to meet
DEADLINE = ["--distributed-timeout-minutes", str(DEADLINE_SECONDS / 60)]
#: Step of the fault; the steps before it must be on record.
STEP = 1


def weight_of(trainer: Trainer) -> torch.nn.Parameter:
    named = trainer.model.named_parameters()
    return next(parameter for name, parameter in named if name.endswith("layers.0.mlp.linear_fc1.weight"))


def poison_weights(trainer: Trainer) -> None:
    weight_of(trainer).data[0, 0] = float("nan")


def poison_gradient(trainer: Trainer) -> None:
    weight_of(trainer).register_hook(lambda gradient: gradient * float("nan"))


def fail(trainer: Trainer) -> None:
    raise ValueError("a fault of ours")


def faulty(witness: Path, *, rank: int | None = None, fault=None):
    """A `prepare` that does `fault` to the trainer of one rank before step STEP.

    Each rank whose step fails writes to `witness` whether its parameters are, bit for bit, those from before the step.
    """

    def prepare(here: int) -> None:
        original = Trainer.step

        def step(trainer: Trainer, number: int):
            if fault is not None and (number, here) == (STEP, rank):
                fault(trainer)
            before = [parameter.detach().clone() for _, parameter in trainer.model.named_parameters()]
            try:
                return original(trainer, number)
            except RunFailure:
                after = [parameter.detach() for _, parameter in trainer.model.named_parameters()]
                pairs = zip(before, after, strict=True)
                same = all(torch.equal(old.view(torch.int32), new.view(torch.int32)) for old, new in pairs)
                (witness / f"same.{here}").write_text(str(same))
                raise

        Trainer.step = step

    return prepare


def assert_stopped_with_batch(ended, folder: Path, quantity: str) -> None:
    """Both ranks ended with 3 and one message, changed no parameter, and left the batch and the steps before it."""
    batch_file = folder / "run" / f"nonfinite_step_{STEP:07d}.json"
    prompts = PromptSampler(32, 4, 1234).batch(STEP)
    message = rf"step {STEP}: {quantity} is not finite; prompts {re.escape(str(prompts))}; the batch is in {batch_file}"
    for rank, end in enumerate(ended):
        assert end.code == 3, end
        assert re.fullmatch(rf"\[rank {rank}\] megatron-jq: error: {message}\n", end.err), end.err
        assert (folder / f"same.{rank}").read_text() == "True"
    batch = json.loads(batch_file.read_text())
    assert batch["step"] == STEP and re.fullmatch(quantity, batch["quantity"])
    assert [prompt["index"] for prompt in batch["prompts"]] == prompts
    slots = [(sequence["prompt_slot"], sequence["rationale_slot"]) for sequence in batch["sequences"]]
    assert slots == [(b, m) for b in range(4) for m in range(4)]
    assert all(s["prompt_ids"] and s["rationale_ids"] and s["answer_ids"] for s in batch["sequences"])
    assert [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").open()] == list(range(STEP))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("fault", "quantity"),
    [
        (poison_weights, r"ln p\(y\*\|x,z\)"),
        (poison_gradient, r"gradient \(\S*decoder\.layers\.0\.mlp\.linear_fc1\.weight\)"),
    ],
)
def test_a_nan_on_one_rank_stops_all_with_the_quantity_and_the_batch(layout, fault, quantity, tmp_path):
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *LAYOUTS[layout]]
    ended = run(argv, tmp_path, size=2, prepare=faulty(tmp_path, rank=1, fault=fault))
    assert_stopped_with_batch(ended, tmp_path, quantity)


def test_a_batch_that_cannot_be_kept_does_not_hide_why_the_run_stopped(tmp_path):
    (tmp_path / "run" / f"nonfinite_step_{STEP:07d}.json").mkdir(parents=True)
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *LAYOUTS["TP2"]]
    ended = run(argv, tmp_path, size=2, prepare=faulty(tmp_path, rank=1, fault=poison_weights))
    assert [end.code for end in ended] == [3, 3], ended
    assert all(f"step {STEP}: ln p(y*|x,z) is not finite; prompts [" in end.err for end in ended), ended
    assert "the batch could not be kept in" in ended[0].err and "Is a directory" in ended[0].err


def ended_with(ended, words: str) -> None:
    """Both ranks ended with 3, and each with the cause on its last line."""
    for rank, end in enumerate(ended):
        last = end.err.splitlines()[-1]
        assert end.code == 3 and last.startswith(f"[rank {rank}] megatron-jq: error: ") and words in last, ended


def test_a_metrics_file_on_a_full_device_ends_all_ranks_with_the_cause(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *LAYOUTS["TP2"], "--resume"]
    cause = "step 0: metrics.jsonl could not be written: No space left on device; fix this and start again with"
    ended_with(run(argv, tmp_path, size=2), cause)


def limit_file_size(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def without_room_for(method: str):
    """A `prepare` that lets no file grow beyond 20 bytes from a call of TensorBoard's writer to the recorder's end."""

    def prepare(rank: int) -> None:
        original, run = getattr(SummaryWriter, method), Trainer.run

        def within_limit(*arguments, **keywords):
            limit_file_size(20)
            return original(*arguments, **keywords)

        def run_and_lift(*arguments):
            try:
                run(*arguments)
            finally:  # standard error is a file too
                limit_file_size(resource.RLIM_INFINITY)

        setattr(SummaryWriter, method, within_limit)
        Trainer.run = run_and_lift

    return prepare


@pytest.mark.parametrize("method", ["__init__", "add_scalar"])
def test_tensorboard_that_cannot_be_written_ends_all_ranks_with_the_cause(method, tmp_path):
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *LAYOUTS["TP2"]]
    ended = run(argv, tmp_path, size=2, prepare=without_room_for(method))
    ended_with(ended, "tensorboard could not be written: File too large; fix this and start again with --resume")
    resumed = run([*argv, "--resume"], tmp_path, size=2)
    assert [end.code for end in resumed] == [0, 0], resumed


def test_a_metrics_file_that_cannot_be_synced_ends_all_ranks_before_the_checkpoint(tmp_path):
    """What a checkpoint counts must be on disk: a device that takes bytes and keeps none does not do."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/null")
    argv = [*SMALL, "--run-dir", str(run_dir), *LAYOUTS["DP2"], "--resume", "--no-tensorboard"]
    ended_with(run(argv, tmp_path, size=2), "metrics.jsonl could not be written: Invalid argument")
    assert list((run_dir / "checkpoints").glob("*iter_*")) == []


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path):
    def without_output(rank: int) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    ended = Ranks([*SMALL, "--run-dir", str(tmp_path / "run")], tmp_path, prepare=without_output).ended()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3, ended


def test_an_update_that_ruins_the_weights_stops_the_next_step(tmp_path):
    flags = ["--lr", "1e30", "--clip-grad", "0"]
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *LAYOUTS["TP2"], *flags]
    ended = run(argv, tmp_path, size=2, prepare=faulty(tmp_path))
    # Which comes first is the model's affair: norms turn what overflows in the forward pass into zeros.
    assert_stopped_with_batch(ended, tmp_path, r"(ln p\(\S+\)|gradient \(\S+\))")


def test_a_killed_rank_ends_the_job_under_torchrun(tmp_path):
    run_dir = tmp_path / "run"
    job = start_torchrun([*SMALL, *ENDLESS, "--run-dir", str(run_dir), *LAYOUTS["TP2"]], 2)
    try:
        wait_for_steps(run_dir, 2, lambda: job.poll() is None)
        workers(job)[1].kill()
    except BaseException:
        print(*kill(job), sep="\n")
        raise
    began = time.monotonic()
    ended = finish(job)
    assert ended.code == 1 and time.monotonic() - began < 30
    codes = worker_codes(ended)
    assert codes[1] == -signal.SIGKILL
    # Rank 0 sees the closed connection at once; torchrun may end it before it has left by itself.
    assert codes.get(0, -signal.SIGTERM) in (3, -signal.SIGTERM)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_ends_the_others_at_once_with_step_and_phase(layout, tmp_path):
    run_dir = tmp_path / "run"
    ranks = Ranks([*SMALL, *ENDLESS, "--run-dir", str(run_dir), *LAYOUTS[layout]], tmp_path, size=2)
    ranks.wait_for_steps(run_dir, 2)
    ranks.signal(0, signal.SIGKILL)
    began = time.monotonic()
    left = ranks.ended(1)[1]
    assert left.code == 3 and time.monotonic() - began < 20
    node = re.escape(socket.gethostname())
    # No torchrun: the store was in rank 0.
    lost = rf"a peer ended or was cut off: .*; this is {node}; no sign of life from the store on rank 0's node"
    pattern = rf"\[rank 1\] megatron-jq: error: step \d+, phase (\w+): {lost}"
    error = left.err.splitlines()[-1]  # torch's own words about the store stand above it
    assert re.fullmatch(pattern, error)[1] in ("rollout", "score", "train", "metrics", "checkpoint"), left.err


def test_a_rank_with_a_fault_of_its_own_shows_it_and_ends_the_others(tmp_path):
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), *LAYOUTS["TP2"]]
    other, faulty_one = run(argv, tmp_path, size=2, prepare=faulty(tmp_path, rank=1, fault=fail))
    assert faulty_one.code == 1 and "ValueError: a fault of ours" in faulty_one.err
    assert other.code == 3 and f"[rank 0] megatron-jq: error: step {STEP}, phase rollout: a peer ended" in other.err


def test_ranks_that_hang_or_never_come_end_the_others_at_the_deadline(tmp_path):
    """All at once, because each waits for the deadline: one stopped rank in every layout, and one that never starts."""
    stopped = {}
    for layout, flags in LAYOUTS.items():
        folder = tmp_path / layout
        folder.mkdir()
        argv = [*SMALL, *ENDLESS, *DEADLINE, "--run-dir", str(folder / "run"), *flags]
        stopped[layout] = Ranks(argv, folder, size=2)
    for layout, ranks in stopped.items():
        ranks.wait_for_steps(tmp_path / layout / "run", 2)
        ranks.signal(1, signal.SIGSTOP)
    began = time.monotonic()
    alone = Ranks([*SMALL, *DEADLINE, "--run-dir", str(tmp_path / "run")], tmp_path, size=2, present=[0])
    late = rf"a peer did not answer within {DEADLINE_SECONDS:g} s \(--distributed-timeout-minutes\): .*\n"
    for ranks in stopped.values():
        left = ranks.ended(0)[0]
        assert left.code == 3
        stacks, error = left.err.splitlines(keepends=True)[:-1], left.err.splitlines(keepends=True)[-1]
        assert re.fullmatch(rf"\[rank 0\] megatron-jq: error: step \d+, phase \w+: {late}", error), left.err
        node = re.escape(socket.gethostname())
        assert re.search(rf"no sign of life from rank 1 on {node} \((set-up|step \d+, phase \w+)\)\n$", error), error
        assert any("in run_training" in line for line in stacks), left.err
    (left,) = alone.ended()
    assert left.code == 3
    error = left.err.splitlines(keepends=True)[-1]
    assert re.fullmatch(rf"\[rank 0\] megatron-jq: error: set-up: {late}", error), left.err
    assert time.monotonic() - began < DEADLINE_SECONDS + 20


def stand_still(trainer: Trainer) -> None:
    time.sleep(1000)


def test_a_phase_that_waits_for_something_else_than_a_peer_ends_at_its_own_deadline(tmp_path):
    seconds = 15
    flags = ["--phase-timeout-minutes", str(seconds / 60), "--run-dir", str(tmp_path / "run"), *LAYOUTS["DP2"]]
    other, stuck = run([*SMALL, *flags], tmp_path, size=2, prepare=faulty(tmp_path, rank=1, fault=stand_still))
    assert stuck.code == 3 and other.code == 3
    assert "in stand_still" in stuck.err
    late = rf"not done within {seconds} s \(--phase-timeout-minutes\) on {re.escape(socket.gethostname())}; the stacks"
    error = stuck.err.splitlines()[-1]
    assert re.match(rf"\[rank 1\] megatron-jq: error: step \d+, phase \w+: {late} above say where", error), error
    assert "[rank 0] megatron-jq: error: " in other.err


def test_only_faults_of_communication_are_reported_as_a_lost_peer():
    phase, deadline = Phase(), timedelta(seconds=5)
    phase.enter_phase(3, "score")
    with pytest.raises(RuntimeError, match="^shapes do not match$") as raised, peers_must_answer(phase, deadline):
        raise RuntimeError("shapes do not match")
    assert type(raised.value) is RuntimeError
    with pytest.raises(RunFailure, match="^step 3: gloomy$") as raised, peers_must_answer(phase, deadline):
        raise RunFailure("step 3: gloomy")
    assert type(raised.value) is RunFailure
    with pytest.raises(PeerFailure, match="^step 3, phase score: a peer did not answer within 5 s"):
        with peers_must_answer(phase, deadline):
            raise RuntimeError("[/x/gloo/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete")
