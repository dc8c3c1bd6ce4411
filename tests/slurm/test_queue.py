"""launch/slurm and the queue: what submitters leave in the environment, preemption, the lock on a folder, places to
submit from, counts of GPUs. Real scripts on a real Slurm; the ranks are stand-ins (stand_in.py), so that a job takes
seconds.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.slurm.cluster import HERE, LAUNCH, Cluster
from tests.slurm.jobs import REHEARSAL, words

BASE = {**REHEARSAL, "LAUNCHER": "tasks", "RANKS_PER_NODE": "1", "PREFLIGHT": "0", "RUN_DIR": "run"}


class Site:
    """A repository of stand-ins and a folder to submit from."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.home = cluster, folder / "submit from", folder / "the repo"
        self.folder.mkdir()
        shutil.copytree(LAUNCH / "slurm", self.home / "launch" / "slurm")
        package = self.home / "megatron_jq"
        package.mkdir()
        (package / "__init__.py").touch()
        shutil.copy(HERE / "stand_in.py", package / "__main__.py")
        self.scripts = self.home / "launch" / "slurm"

    def submit(self, script: str = "train.sbatch", *arguments, flags=(), through=(), cwd=None, **variables) -> str:
        """sbatch, inside the commands of `through`. Returns the job's number."""
        path = script if "/" in script else str(self.scripts / script)
        command = [*through, "sbatch", "--parsable", *flags, path, *arguments]
        done = self.cluster.run(*command, cwd=cwd or self.folder, **{**BASE, **variables})
        return done.stdout.split()[-1]

    def words(self, job: str) -> str:
        return words(self.folder, job)

    def logs(self, job: str, start: int = 1) -> str:
        paths = sorted(self.folder.glob(f"run/logs/{job}.{start}/*.log"))
        return "".join(path.read_text() for path in paths)

    def ended(self, job: str, seconds: float = 90) -> tuple[str, int]:
        """(state, exit code) of a job at its end."""
        record = self.cluster.wait(job, seconds)
        return record.state, record.code

    def until_said(self, job: str, text: str, start: int = 1) -> None:
        self.cluster.until(lambda: text in self.logs(job, start), 60, f"{text!r} in the log", every=0.05)

    def preempt(self) -> None:
        """Another partition's job takes the nodes: SIGTERM to all steps, and the job's end after 60 s."""
        self.cluster.run("sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--wrap=true", cwd=self.folder)


@pytest.fixture
def site(cluster, tmp_path) -> Site:
    return Site(cluster, tmp_path)


#: What salloc, srun and sbatch leave in the environment of what is called from inside them, beside what jobs set.
LEFT_BY_A_SUBMITTER = {
    "SLURM_CPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu=1", "SLURM_MEM_PER_CPU": "500", "SLURM_NTASKS": "1",
    "SLURM_NPROCS": "1", "SLURM_DISTRIBUTION": "cyclic", "SLURM_EXACT": "1", "SLURM_GPUS": "1",
    "SLURM_STEP_GRES": "gpu:1",
    "SLURM_NTASKS_PER_GPU": "1", "SLURM_MEM_PER_GPU": "100", "SLURM_GPUS_PER_TASK": "1", "SLURM_HET_SIZE": "2",
    "SLURM_HINT": "nomultithread", "SLURM_TIMELIMIT": "1", "SLURM_KILL_BAD_EXIT": "1", "SLURM_STDOUTMODE": "none",
    "SLURM_WORKING_DIR": "/", "SLURM_RESTART_COUNT": "1", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_THREADS_PER_CORE": "2", "SLURM_CPU_BIND": "map_cpu:0", "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "5",
    "SQUEUE_STATES": "SUSPENDED", "SLURM_TIME_FORMAT": "relative",
}  # fmt: skip


def test_from_wherever_a_job_is_submitted_its_ranks_get_the_whole_nodes(site):
    ways = {
        "a plain shell": site.submit(),
        "salloc": site.submit(through=("salloc", "-N1", "-n1", "-c4", "--mem-per-cpu=500", "--gpus-per-node=1")),
        "srun": site.submit(through=("srun", "-N1", "-n1", "-c2", "--mem=3000")),
        "every variable at once": site.submit(**LEFT_BY_A_SUBMITTER),
        "sbatch -c": site.submit(flags=("--cpus-per-task=2",)),
    }
    for way, job in ways.items():
        assert site.ended(job) == ("COMPLETED", 0), f"{way}\n{site.words(job)}"
        assert "start 1: 2 x 1 ranks" in site.words(job)  # and no SLURM_RESTART_COUNT of another job
        assert re.search(r"TRES=(\S+)", site.logs(job))[1] == "cpu=32,mem=128G,node=2", way
    assert os.readlink(site.folder / "run" / "logs" / "job") == job  # not 77_3


@pytest.mark.parametrize(
    ("moment", "variables"),
    [
        ("preflight", {"PREFLIGHT": "1", "PREFLIGHT_SECONDS": "8"}),
        ("ranks that start", {"STARTUP": "8"}),
        ("the first step", {"STEPS": "2", "STEP_SECONDS": "8"}),
    ],
)
def test_a_preempted_job_comes_back_whether_or_not_a_step_was_done(site, moment, variables):
    job = site.submit(**variables)
    if moment == "preflight":
        site.cluster.until(lambda: "command preflight" in site.words(job), 60, "preflight", every=0.05)
    elif moment == "ranks that start":
        site.until_said(job, "command train")
    else:
        site.until_said(job, "step 1")
    site.preempt()
    site.cluster.until(lambda: site.cluster.job(job).restarts == 1, 60, "the job in the queue again", every=0.2)
    assert "back to the queue" in site.words(job)
    assert site.ended(job) == ("COMPLETED", 0), site.words(job)
    assert f"done: {variables.get('STEPS', 1)} steps" in site.words(job)


def test_usr1_reaches_ranks_that_hold_all_memory_of_the_job_which_keeps_its_folder_in_the_queue(site):
    """A step without --mem holds it all: the one that passes USR1 on shares it (--overlap)."""
    job = site.submit(STEPS="3", STEP_SECONDS="2")
    site.until_said(job, "step 1")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    site.cluster.until(lambda: site.cluster.job(job).restarts == 1, 60, "the job in the queue again", every=0.2)
    assert "saved after step 1 of 3; back to the queue" in site.words(job)
    second = site.submit()  # while the first one waits for its second start, the folder is its own
    assert site.ended(second) == ("FAILED", 2) and f"job {job} works in" in site.words(second)
    assert site.ended(job) == ("COMPLETED", 0), site.words(job)


def test_a_job_that_meets_its_time_limit_without_a_step_ends_and_one_that_has_nothing_to_do_is_done(site):
    # The stand-in's handler comes after the whole wait: no step is done when USR1 comes, and Slurm took no nodes.
    idle = site.submit(STARTUP="8", STEPS="1", PREFLIGHT="1", PREFLIGHT_SECONDS="4")
    site.cluster.until(lambda: "command preflight" in site.words(idle), 60, "preflight", every=0.05)
    site.cluster.run("scancel", "--batch", "--signal=USR1", idle)
    assert site.ended(idle) == ("FAILED", 3)
    assert "stopped before a step was done: give the job more time" in site.words(idle)
    first = site.submit()
    assert site.ended(first) == ("COMPLETED", 0), site.words(first)
    again = site.submit(PREFLIGHT="1", PREFLIGHT_SECONDS="4", SAVE_SECONDS="2")
    site.cluster.until(lambda: "command preflight" in site.words(again), 60, "preflight", every=0.05)
    site.cluster.run("scancel", "--batch", "--signal=USR1", again)
    assert site.ended(again) == ("COMPLETED", 0), site.words(again)
    assert "more time" not in site.words(again) and "done: 1 steps" in site.words(again)


def test_a_folder_is_held_until_the_last_rank_of_its_job_has_left_it(site):
    holder = site.submit(flags=("--nodes=1",), STEPS="9", STEP_SECONDS="0.5", SAVE_SECONDS="4")
    site.until_said(holder, "step 1")
    site.cluster.run("scancel", holder)  # its rank saves on: the job is COMPLETING, and there is another node
    second = site.submit(flags=("--nodes=1",))
    state, code = site.ended(second)
    assert (state, code) == ("FAILED", 2), f"{site.words(second)}\n{site.logs(holder)}\n{site.logs(second)}"
    assert f"job {holder} works in {site.folder / 'run'}: wait" in site.words(second)
    site.cluster.until(lambda: site.cluster.idle_nodes() == 2, 60, "idle nodes", every=0.2)
    assert site.ended(site.submit()) == ("COMPLETED", 0)  # it has let go


def test_where_squeue_does_not_say_who_works_in_a_folder_it_is_not_taken(site):
    tools = site.folder / "tools"
    tools.mkdir()
    answers = {
        "Unable to contact slurm controller (connect failure)": 3,
        "Socket timed out on send/recv operation": 3,
        "Invalid job id specified": 0,  # purged: it has ended
    }
    logs = site.folder / "run" / "logs"
    logs.mkdir(parents=True)
    for answer, code in answers.items():
        (logs / "job").unlink(missing_ok=True)
        (logs / "job").symlink_to("99999")
        squeue = tools / "squeue"
        squeue.write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: {answer}' >&2\nexit 1\n")
        squeue.chmod(0o755)
        job = site.submit(PATH=f"{tools}:{os.environ['PATH']}:/usr/sbin:/sbin")
        assert site.ended(job)[1] == code, site.words(job)
        assert (logs / "job").readlink().name == (job if code == 0 else "99999")
        said = f"whether job 99999 has ended (exit code 1): slurm_load_jobs error: {answer}"
        assert (said in site.words(job)) == (code != 0)
    (logs / "job").unlink()
    (logs / "job").symlink_to("99999_3")  # and Slurm's own answer to a number that it does not know
    job = site.submit()
    assert site.ended(job) == ("COMPLETED", 0), site.words(job)


def test_scripts_are_found_from_wherever_they_are_submitted(site):
    """plot.sbatch ends with its own first refusal once it has found the repository."""
    elsewhere = site.home / "other"
    elsewhere.mkdir()
    shutil.copy(site.scripts / "plot.sbatch", site.scripts / "edited.sbatch")
    (site.folder / "link.sbatch").symlink_to(site.scripts / "plot.sbatch")
    rows = [
        (site.home, (), "launch/slurm/plot.sbatch"),
        (site.home, (), "./launch/slurm/plot.sbatch"),
        (site.home / "launch", (), "slurm/plot.sbatch"),
        (site.home / "launch", (), "./slurm/plot.sbatch"),
        (site.scripts, (), "plot.sbatch"),
        (site.scripts, (), "./plot.sbatch"),
        (site.scripts, (), "./edited.sbatch"),
        (site.scripts, ("--chdir=/tmp",), "./plot.sbatch"),
        (elsewhere, (), "../launch/slurm/plot.sbatch"),
        (site.home, ("--chdir=/tmp",), "launch/slurm/plot.sbatch"),
        (site.home, ("--chdir=/tmp",), "./launch/slurm/plot.sbatch"),
        (site.folder, ("--chdir=/tmp",), str(site.scripts / "plot.sbatch")),
    ]
    jobs = []
    for k, (cwd, flags, script) in enumerate(rows):
        flags = (*flags, f"--output={site.folder}/place-{k}.out")
        arguments = ("--config", "../launch/slurm/x.toml", "plot.sbatch")
        done = site.cluster.run("sbatch", "--parsable", *flags, script, *arguments, cwd=cwd, **REHEARSAL)
        jobs.append(done.stdout.strip())
    for k, job in enumerate(jobs):
        site.ended(job)
        said = (site.folder / f"place-{k}.out").read_text()
        assert "SWEEP_DIR: name the folder that holds the runs" in said, f"{rows[k]}: {said}"


def test_ranks_are_as_many_as_the_gpus_that_were_asked_for_or_the_job_says_why_not(site):
    for name, header in {"gres": "--gres=gpu:4", "typed": "--gres=gpu:h100:4", "per-node": "--gpus-per-node=4"}.items():
        text = (site.scripts / "train.sbatch").read_text()
        (site.scripts / f"{name}.sbatch").write_text(text.replace("--gpus-per-node=8", header))
    rows = [
        ("train.sbatch", ("--gpus-per-node=2",), "2 x 2 ranks"),
        ("gres.sbatch", (), "2 x 4 ranks"),
        ("typed.sbatch", (), "2 x 4 ranks"),
        ("per-node.sbatch", (), "2 x 4 ranks"),
        ("train.sbatch", ("--gres=gpu:2",), "gpu:2): --gres does not replace the header's --gpus-per-node"),
    ]
    for k, (script, flags, expected) in enumerate(rows):
        job = site.submit(script, flags=flags, RANKS_PER_NODE="", RUN_DIR=f"run{k}", SLURM_GPUS_PER_NODE="7")
        site.ended(job)
        assert expected in site.words(job), site.words(job)
    text = (site.scripts / "train.sbatch").read_text().replace("--exclusive", "--job-name=shared")
    (site.scripts / "shared.sbatch").write_text(text)
    job = site.submit("shared.sbatch", flags=("--gpus-per-node=2",), RANKS_PER_NODE="4", DEVICE="cuda")
    assert site.ended(job) == ("FAILED", 2)
    assert "4 ranks a node, but this job has 2 GPUs on node" in site.words(job)


@pytest.mark.parametrize("name", ["..", ".", "/", "a/../b"])
def test_a_job_name_that_is_no_folder_is_refused(site, name):
    job = site.submit(flags=(f"--job-name={name}", f"--output={site.folder}/named-%j.out"), RUN_DIR="")
    assert site.ended(job) == ("FAILED", 2)
    assert f"--job-name '{name}' is no name for a folder" in site.words(job)


def test_an_evaluation_takes_the_checkpoints_from_where_the_run_keeps_them(site):
    run_dir = site.folder / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text('[checkpoint]\nsave = "/data/my \\"best\\" run"\n')
    for variables, load in [({}, '/data/my "best" run'), ({"LOAD": "other"}, "other")]:
        job = site.submit("evaluate.sbatch", "--seed", "7", **variables)
        assert site.ended(job) == ("COMPLETED", 0), site.words(job)
        expected = f"command evaluate --load {load} --output {run_dir}/evaluation --device cpu --seed 7"
        assert expected in site.logs(job).splitlines()
    for flag, instead in [("--load=x", "LOAD"), ("--output", "EVALUATION_DIR"), ("--device", "DEVICE")]:
        job = site.submit("evaluate.sbatch", flag)
        assert site.ended(job) == ("FAILED", 2) and f"set {instead}" in site.words(job)


@pytest.mark.parametrize(
    ("arguments", "values", "said"),
    [
        (("--save=x",), "0.5", "--save=x: points would share one folder of checkpoints"),
        ((), "0.5/../../x", "QS=0.5/../../x: 0.5/../../x is no number"),
        ((), "a[$(touch${IFS}ran)]", "is no number"),
    ],
)
def test_a_sweep_refuses_what_would_leave_its_points_folders(site, arguments, values, said):
    flags = ("--array=0", f"--output={site.folder}/sweep.out")
    job = site.submit("sweep.sbatch", *arguments, flags=flags, QS=values, SWEEP_DIR="sweep", RUN_DIR="")
    assert site.ended(f"{job}_0") == ("FAILED", 2)
    assert said in (site.folder / "sweep.out").read_text() and not list(site.home.parent.rglob("ran"))
    assert [path.name for path in (site.folder / "sweep").iterdir()] == ["logs"]


def test_text_in_the_runs_files_is_no_command(site):
    marker = site.folder / "ran"
    tracker = site.folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(f"a[$(touch${{IFS}}'{marker}')]")
    (site.folder / "run" / "config.toml").write_text("train_iters = 3\n")
    job = site.submit()
    assert site.ended(job) == ("FAILED", 2) and not marker.exists()
    assert f"{tracker} is 'a[$(touch" in site.words(job) and "expected a whole number" in site.words(job)


def test_plain_scancel_saves(site):
    job = site.submit(STEPS="9", STEP_SECONDS="0.5")
    site.until_said(job, "step 2")
    site.cluster.run("scancel", job)
    site.cluster.until(lambda: site.cluster.job(job).state == "CANCELLED", 60, "its end", every=0.2)
    site.until_said(job, "saved")
    assert "back to the queue" not in site.words(job)
