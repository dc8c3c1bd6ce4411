"""launch/slurm on a real Slurm of two nodes, with the tiny policy over gloo: from sbatch to the last exit code."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from megatron_jq.checkpoint import folder as checkpoints
from tests.e2e.launch import SMALL, run
from tests.slurm.cluster import LAUNCH
from tests.slurm.jobs import REHEARSAL, TINY, finished, logs, metrics, steps_on_record, submit, words

TP2 = ["--tensor-model-parallel-size", "2"]
SCRIPT = LAUNCH / "slurm" / "train.sbatch"
PHASE = r"step \d+.*\bphase (rollout|score|train|metrics|checkpoint)\b"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where jobs are submitted from: a blank in its name, and not the repository."""
    path = tmp_path / "a folder"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory):
    """Uninterrupted runs without Slurm on forked ranks: (size, flags) → metrics."""
    known = {}

    def of(size: int, *flags: str) -> list[dict]:
        if (size, flags) not in known:
            there = tmp_path_factory.mktemp("whole")
            ended = run([*SMALL, "--run-dir", str(there / "run"), *flags], there, size=size)
            assert [rank.code for rank in ended] == [0] * size, ended
            known[size, flags] = metrics(there / "run")
        return known[size, flags]

    return of


@pytest.mark.parametrize("script", sorted(path.name for path in (LAUNCH / "slurm").glob("*.sbatch")))
def test_slurm_accepts_every_script_as_it_is(cluster, script, tmp_path):
    done = cluster.run("sbatch", "--test-only", str(LAUNCH / "slurm" / script), cwd=tmp_path)
    assert "to start at" in done.stderr


def test_two_nodes_train_as_one_does_and_an_evaluation_follows(cluster, folder, on_one_node):
    flags = [*TP2, "--estimator", "garl"]
    job = submit(cluster, folder, "my run", *TINY, *flags, ranks=2, LAUNCHER="torchrun")
    after = cluster.sbatch(
        "evaluate.sbatch", *SLOWLY, flags=(f"--dependency=afterok:{job}",), cwd=folder,
        **REHEARSAL, RUN_DIR="my run", RANKS_PER_NODE="1",
    )  # fmt: skip
    assert cluster.job(after).state == "PENDING"
    finished(cluster, job, folder)
    assert metrics(folder / "my run") == on_one_node(4, *flags)
    assert {path.name for path in folder.glob(f"my run/logs/{job}.1/*.log")} == {"node0-node1.log", "node1-node2.log"}
    inspected = cluster.sbatch("convert.sbatch", "inspect", "--load", "my run/checkpoints", cwd=folder, **REHEARSAL)
    an_evaluation_is_queued_again_and_goes_on(cluster, after, folder, folder / "my run")
    assert "iter_0000003" in finished(cluster, inspected, folder)


#: An evaluation that draws one sample after the other, about a second a prompt, so that it can be met between two.
SLOWLY = ["--eval-samples", "32", "--rollout-batch-size", "1"]


def an_evaluation_is_queued_again_and_goes_on(cluster, job, folder, run_dir):
    """At USR1, with the samples of an evaluation that nothing stopped."""
    samples = run_dir / "evaluation" / "samples.jsonl"
    cluster.until(lambda: samples.exists() and samples.read_text().count("\n") > 1, 120, "samples", every=0.01)
    [(rank, _)] = cluster.ranks().values()
    rank.suspend()  # or all prompts would be done before the signal comes
    done = samples.read_text().count("\n") - 1
    assert done < 4 * 32
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: cluster.job(job).restarts == 1, 60, "the job in the queue again", every=0.2)
    said = finished(cluster, job, folder)
    assert f"stopped after {done} samples; back to the queue" in said and "evaluation.json" in said
    log = run_dir / "logs" / f"{job}.2" / "node0-node1.log"
    assert f"{done // 32} of 4 prompts are done already" in log.read_text()
    argv = ["evaluate", "--load", str(run_dir / "checkpoints"), "--output", str(folder / "whole"), *SLOWLY]
    [whole] = run([*argv, "--device", "cpu"], folder)
    assert whole.code == 0, whole
    results = [
        json.loads((path / "evaluation.json").read_text()) for path in (run_dir / "evaluation", folder / "whole")
    ]
    assert results[0]["metrics"] == results[1]["metrics"] and "pass@32" in results[0]["metrics"]


def test_slurm_can_start_every_rank_itself(cluster, folder, on_one_node):
    flags = [*TP2, "--estimator", "paft"]
    # An address without a name, and an environment of which sbatch passes on a few variables: all the site needs.
    passed = ",".join([*REHEARSAL, "RUN_DIR", "RANKS_PER_NODE", "LAUNCHER", "MASTER_ADDR"])
    job = submit(
        cluster, folder, "run", *TINY, *flags,
        ranks=2, LAUNCHER="tasks", MASTER_ADDR="10.77.1.1", SBATCH_EXPORT=passed,
    )  # fmt: skip
    finished(cluster, job, folder)
    assert metrics(folder / "run") == on_one_node(4, *flags)


def test_before_its_time_limit_and_when_preempted_a_job_saves_queues_itself_again_and_goes_on(
    cluster, folder, on_one_node
):
    flags = ["--train-iters", "60"]
    job = submit(cluster, folder, "run", *TINY, *flags, LAUNCHER="torchrun")
    cluster.until(lambda: steps_on_record(folder / "run") >= 3, 120, "step 3")
    ranks = [process for process, _ in cluster.ranks().values()]
    for process in ranks:
        process.suspend()  # or all steps would be done before the signal comes
    # The shipped header asks for USR1 300 s before the limit: with a limit of 6 minutes that is now, within the half
    # minute that Slurm takes between two looks at its clocks.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=6")
    cluster.until(lambda: "USR1: the ranks are asked" in words(folder, job), 90, "USR1", every=0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    for process in ranks:
        process.resume()
    cluster.until(lambda: cluster.job(job).restarts == 1, 60, "the job in the queue again", every=0.2)
    steps = steps_on_record(folder / "run")
    assert 3 <= steps < 60
    assert checkpoints.find(folder / "run" / "checkpoints").name == checkpoints.folder_name(steps)

    cluster.until(lambda: steps_on_record(folder / "run") > steps, 120, "another step", every=0.005)
    ranks = [process for process, _ in cluster.ranks().values()]
    for process in ranks:
        process.suspend()
    assert steps_on_record(folder / "run") < 60
    # It takes the nodes: Slurm sends the steps SIGCONT and SIGTERM, and would end the job after a GraceTime of 60 s.
    cluster.run("sbatch", "--partition=urgent", "--exclusive", "--wrap=true", cwd=folder)
    cluster.until(lambda: cluster.job(job).restarts == 2, 60, "the job in the queue again", every=0.2)
    said = finished(cluster, job, folder)
    saved = re.findall(r"saved after step (\d+) of 60; back to the queue", said)
    assert len(saved) == 2 and int(saved[0]) == steps < int(saved[1]) < 60
    assert metrics(folder / "run") == on_one_node(2, *flags)


@pytest.mark.parametrize("launcher", ["torchrun", "tasks"])
def test_a_killed_rank_ends_the_job_with_its_exit_code_node_and_phase(cluster, folder, launcher):
    job = submit(cluster, folder, "run", *TINY, "--train-iters", "1000000", LAUNCHER=launcher)
    cluster.until(lambda: steps_on_record(folder / "run") >= 2, 120, "step 2")
    process, node = cluster.ranks()[1]
    assert node == "node2"
    process.kill()
    began = time.monotonic()
    ended = cluster.wait(job, 60)
    said = words(folder, job)
    assert time.monotonic() - began < 60, said
    assert (ended.state, ended.code) == ("FAILED", 128 + signal.SIGKILL), f"{said}\n{logs(folder)}"
    assert "rank 1 on node2 failed first: exit code 137, signal KILL" in said
    assert re.search(rf"\[rank 0\] megatron-jq: error: .*{PHASE}", said), said


def test_a_killed_node_queues_the_job_again_and_it_completes(cluster, folder, on_one_node):
    flags = ["--train-iters", "60", "--save-interval", "5"]
    # The other node's ranks notice before Slurm does: the job must outlive them, or it would have failed by then.
    job = submit(cluster, folder, "run", *TINY, *flags, LAUNCHER="torchrun", PEER_GRACE_SECONDS="5")
    cluster.until(lambda: steps_on_record(folder / "run") >= 6, 120, "step 6")
    try:
        cluster.kill_node("node2")
        cluster.until(lambda: cluster.job(job).restarts == 1, 120, "the job in the queue again", every=0.5)
    finally:
        cluster.start_node("node2")
    finished(cluster, job, folder)
    assert metrics(folder / "run") == on_one_node(2, *flags)


def test_a_master_address_that_does_not_resolve_fails_within_ten_seconds(cluster, folder):
    job = submit(cluster, folder, "run", *TINY, MASTER_ADDR="no-such-host.invalid")
    began = time.monotonic()
    ended = cluster.wait(job, 30)
    assert time.monotonic() - began < 10
    assert (ended.state, ended.code) == ("FAILED", 3)
    assert re.search(r"MASTER_ADDR=no-such-host.invalid does not resolve on node[12]", words(folder, job))
    assert not (folder / "run").exists()


def test_a_node_that_is_unfit_is_named_within_seconds(cluster, folder):
    (folder / "run").mkdir()
    cluster.in_node("node2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder / "run"))
    try:
        job = submit(cluster, folder, "run", *TINY, DEVICE="cuda")
        began = time.monotonic()
        ended = cluster.wait(job, 60)
        assert time.monotonic() - began < 30
    finally:
        cluster.in_node("node2", "umount", str(folder / "run"))
    said = words(folder, job)
    assert (ended.state, ended.code) == ("FAILED", 3), said
    assert "preflight: node1: 0 of 1 GPUs" in said and "preflight: node2: 0 of 1 GPUs" in said
    assert f"preflight: node2: run directory {folder / 'run'} is not shared" in said
    assert "preflight: node2: 0.00 GiB of free disk for the run directory, 0.1 wanted" in said
    assert list((folder / "run").iterdir()) == []


def test_what_cannot_work_is_refused_at_once(cluster, folder):
    # Of an array's last element Slurm's record holds all the others too. The script's own path ends where it does.
    refused = submit(
        cluster, folder, "run", "--config", "/other/launch/slurm/x.toml", "--run-dir", "elsewhere",
        SBATCH_ARRAY_INX="0-1",
    )  # fmt: skip
    several = cluster.run("sbatch", "--parsable", "-N1", ":", "-N1", str(SCRIPT), cwd=folder).stdout.strip()
    (folder / "copy.sbatch").write_bytes(SCRIPT.read_bytes())
    copied = cluster.run("sbatch", "--parsable", str(folder / "copy.sbatch"), cwd=folder).stdout.strip()
    for job, code, said in [
        (f"{refused}_0", 2, "error: set RUN_DIR instead of --run-dir"),
        (f"{refused}_1", 2, "error: set RUN_DIR instead of --run-dir"),
        (several, 2, "error: a heterogeneous job"),
        (copied, 1, "MEGATRON_JQ_HOME: this is a copy of a script: set it to the repository"),
    ]:
        ended = cluster.wait(job, 30)
        assert (ended.state, ended.code) == ("FAILED", code), ended
        assert said in words(folder, ended.fields["JobId"] if "_" in job else job)


def test_bad_flags_end_the_job_with_exit_code_2_and_are_shown(cluster, folder):
    job = submit(cluster, folder, "100% 'mine' %j", *TINY, "--q", "-1", LAUNCHER="tasks")
    ended = cluster.wait(job, 120)
    said = words(folder, job)
    assert (ended.state, ended.code) == ("FAILED", 2), said
    assert re.search(r"rank [01] on node[12] failed first: exit code 2\n.*megatron-jq: error: --q", said, re.DOTALL)


def test_an_index_without_a_value_is_refused(cluster, folder):
    job = cluster.sbatch("sweep.sbatch", *TINY, flags=("--array=7",), cwd=folder, **REHEARSAL)
    ended = cluster.wait(f"{job}_7", 30)
    assert (ended.state, ended.code) == ("FAILED", 2)
    said = "".join(path.read_text() for path in folder.glob("*.out"))
    assert "error: QS has 5 values, none for index 7: --array 0-4" in said


def test_a_point_of_a_sweep_queues_itself_again_and_no_second_one_works_in_its_folder(cluster, folder, on_one_node):
    flags = ["--train-iters", "4"]
    variables = {**REHEARSAL, "SWEEP_DIR": "my sweep", "QS": "0.5 0.5", "RANKS_PER_NODE": "1", "LAUNCHER": "tasks"}
    job = cluster.sbatch(
        "sweep.sbatch", *TINY, *flags, flags=("--array=0-1", "--account=me"), cwd=folder, **variables
    )  # fmt: skip
    run_dir = folder / "my sweep" / "q0.5"
    cluster.until(cluster.ranks, 60, "a rank")
    first = os.readlink(run_dir / "logs" / "job")
    # It comes while the rank starts, and waits until the rank can handle it.
    assert steps_on_record(run_dir) == 0
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    second = next(name for name in (f"{job}_0", f"{job}_1") if name != first)
    ended = cluster.wait(second, 30)
    assert (ended.state, ended.code) == ("FAILED", 2)
    said = "".join(path.read_text() for path in folder.glob("*.out"))
    assert f"error: job {first} works in {run_dir}: wait" in said
    drawing = "squeue", "--noheader", "--name=megatron-jq-plot", "--states=PENDING", "--format=%a %E"
    assert cluster.run(*drawing).stdout.startswith("me afterany:")
    cluster.until(lambda: not cluster.run("squeue", "--noheader").stdout.strip(), 240, "an empty queue", every=0.5)
    assert (cluster.job(first).state, cluster.job(first).restarts) == ("COMPLETED", 1)
    assert metrics(run_dir) == on_one_node(1, "--q", "0.5", *flags)
    drawn = "".join(path.read_text() for path in folder.glob("*plot*.out"))
    assert (folder / "my sweep" / "comparison.png").exists() and "1 of 2 runs hold metrics" in drawn


def test_a_sweep_trains_its_grid_and_draws_the_comparison(cluster, folder):
    grid = folder / "my grid.toml"
    grid.write_text('estimator = ["garl", "paft"]\nq = [0.5]\ntrain_iters = 2\n')
    variables = {**REHEARSAL, "SWEEP_DIR": "my sweep", "GRID": str(grid), "RANKS_PER_NODE": "1"}
    job = cluster.sbatch("sweep.sbatch", *TINY[:-4], flags=("--array=0-1",), cwd=folder, **variables)
    picture = folder / "my sweep" / "comparison.png"
    cluster.until(lambda: not cluster.run("squeue", "--noheader").stdout.strip(), 240, "an empty queue", every=0.5)
    said = "".join(path.read_text() for path in folder.glob("*.out"))
    assert picture.exists(), said + logs(folder)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "my sweep").glob("logs/drawing-*"))) == 1 and job
    for name in ("garl-q0.5", "paft-q0.5"):
        assert steps_on_record(folder / "my sweep" / name) == 2
        assert re.search(rf"\| {name} +\| {name[:4]} +\| 0.5 +\| +2 \|", said), said
