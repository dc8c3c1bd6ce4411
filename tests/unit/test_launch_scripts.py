"""launch/slurm's shell functions, as far as no Slurm is needed; what bash may compute with; how scripts are found."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "launch" / "slurm"
SCRIPTS = sorted(
    [path for kind in ("sbatch", "sh") for path in REPOSITORY.glob(f"[a-z]*/**/*.{kind}")]
    + [path for path in (REPOSITORY / ".ci" / "run",) if path.exists()]
)

#: What stands in an arithmetic context, and why that is a number. bash would run a command in any other text.
NUMBERS = {
    "RANKS_PER_NODE": "set_up checks it",
    "SLURM_GPUS_ON_NODE": "check_gpus checks it",
    "SLURM_JOB_ID": "slurmd sets it for every job",
    "SLURM_ARRAY_TASK_ID": "sweep.sbatch checks it",
    "SWEEP_POINTS": "plot.sbatch checks it",
    "restarts": "who_am_i checks it",
    "saved": "steps_saved checks the tracker's text",
    "before": "steps_saved checks it; samples_done counts lines",
    "wanted": "all_steps_done checks it",
    "code": "explain_failure takes records of digits alone",
    "tasks": "1 or RANKS_PER_NODE",
    "samples_done": "wc counts",
    "numbers": "samples_wanted takes digits alone",
    "2": "signal_agents gives it `tasks`",
    "SECONDS": "bash's own", "began": "taken from SECONDS",
    "status": "an exit code", "cluster_status": "an exit code",
    "gpus": "an argument of the test cluster", "g": "a loop's number",
}  # fmt: skip


def uncommented(path: Path) -> str:
    return re.sub(r"(?m)^\s*#.*$|(?<=\s)# .*$", "", path.read_text())


def arithmetic(text: str) -> list[str]:
    """The insides of $((…)), ((…)), [[ … -lt … ]], subscripts, substrings, let and declare -i."""
    inside = re.findall(r"\(\((.*?)\)\)", text)
    inside += [word for pair in re.findall(r"(\S+) -(?:lt|le|gt|ge|eq|ne) (\S+)", text) for word in pair]
    inside += re.findall(r"\$\{\w+\[([^]@*]+)\]", text)
    inside += re.findall(r"\$\{\w+:(\$?\w+[^}]*)\}", text)
    inside += re.findall(r"\b(?:let|declare -i|local -i)\b(.*)", text)
    return inside


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_computes_with_numbers_alone(path):
    text = uncommented(path)
    assert not re.search(r"(?m)(^|[;&|({] *|\b(?:then|do|else) )eval\b", text)
    for expression in arithmetic(text):
        bare = re.sub(r"\$\{#\w+\[@\]\}", "0", expression)  # a number of elements
        bare = re.sub(r"\$\((\w+)\)", r"\1", bare)  # what a function of ours prints
        names = set(re.findall(r"[A-Za-z_]\w*|(?<=\$)\d", bare))
        assert "$(" not in bare and names <= set(NUMBERS), f"{path.name}: {expression}"


def test_the_check_sees_every_kind_of_arithmetic():
    kinds = ["$((x + 1))", "((x > 0))", "[[ ${x:-1} -lt 3 ]]", "${list[$x]}", "${y:$x:2}", "let x=1", "declare -i x=$y"]
    for kind in kinds:
        assert any("x" in expression for expression in arithmetic(kind)), kind


def shell(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of bash after common.sh, as in a job."""
    settings = {"PATH": "/usr/bin:/bin", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "7", **variables}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'. "$0"; {code}', str(SLURM / "common.sh"), *arguments],
        env=settings, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "08", "1e3", "1 2", "a[$(touch ran)]", "1234567890"])
def test_a_tracker_that_holds_no_number_is_refused_by_name(text, tmp_path):
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir()
    tracker.write_text(text + "\n")
    done = shell(f"cd '{tmp_path}'; before=$(steps_saved); echo went on: $((before))", RUN_DIR=str(tmp_path))
    assert done.returncode == 2 and "expected a whole number" in done.stderr and "went on" not in done.stdout
    assert str(tracker) in done.stderr and not (tmp_path / "ran").exists()


def test_steps_are_read_from_where_the_run_saves(tmp_path):
    assert shell("steps_saved", RUN_DIR=str(tmp_path)).stdout == "0\n"
    (tmp_path / "my runs").mkdir()
    (tmp_path / "my runs" / "latest_checkpointed_iteration.txt").write_text("12\n")
    (tmp_path / "config.toml").write_text(f'[training]\ntrain_iters = 20\n[checkpoint]\nsave = "{tmp_path}/my runs"\n')
    assert shell("steps_saved", RUN_DIR=str(tmp_path)).stdout == "12\n"
    assert shell("all_steps_done", RUN_DIR=str(tmp_path)).returncode == 1
    (tmp_path / "my runs" / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert shell("all_steps_done", RUN_DIR=str(tmp_path)).returncode == 0


@pytest.mark.parametrize(
    ("records", "status", "told", "expected"),
    [
        (["0 1.0 137 1 node2", "2 2.0 143 0 node1"], 1, False, "137 0 0"),
        (["1 1.0 3 0 node1", "2 2.0 143 1 node2"], 1, False, "3 0 0"),
        (["1 1.0 3 0 node1", "2 2.0 143 1 node2"], 1, True, "3 1 1"),  # its peer was told a moment earlier
        (["2 1.0 143 0 node1"], 143, True, "143 1 1"),
        (["2 1.0 143 0 node1"], 143, False, "143 1 0"),
        ([], 143, False, "143 1 1"),  # before node.py could leave a record
        ([], 7, False, "7 0 0"),
        (["0 1.0 a[$(touch ran)] 1 node2"], 5, False, "5 0 0"),
    ],
)
def test_the_first_failure_and_who_ended_the_ranks(records, status, told, expected, tmp_path):
    for name in ("failures", "told"):
        (tmp_path / name).mkdir()
    for k, record in enumerate(records):
        (tmp_path / "failures" / str(k)).write_text(record + "\n")
    done = shell(
        f"cd '{tmp_path}'; LOGS=$PWD STATUS={status} TOLD=0 TAKEN={int(told)} HOSTS=()\n"
        'wait_for_requeue_if_a_node_is_lost() { :; }\nexplain_failure\necho "$STATUS $TOLD $TAKEN"',
    )
    assert done.stdout.splitlines()[-1] == expected, done.stderr
    assert not (tmp_path / "ran").exists()


#: As Slurm 22.05.8 writes it: an array's last element, whose number shows the others too.
RECORDS = """\
JobId=7 ArrayJobId=7 ArrayTaskId=1 JobName=x Restarts=9 JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   StartTime=2026-11-30T05:01:21 EndTime=2026-11-30T05:02:24 Deadline=N/A
   PreemptEligibleTime=2026-11-30T05:01:21 PreemptTime=None
   Command=/repo/launch/slurm/train.sbatch --config Restarts=5
   TresPerNode=gres:gpu:8

JobId=8 ArrayJobId=7 ArrayTaskId=0 JobName=y
   JobState=COMPLETED Reason=None Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
"""


def with_record(record: str, code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`code` where scontrol shows this record."""
    (tmp_path / "record").write_text(record)
    return shell(f"scontrol() {{ cat '{tmp_path}/record'; }}; timeout() {{ shift; \"$@\"; }}; {code}", **variables)


@pytest.mark.parametrize(
    ("old", "new", "code", "expected"),
    [
        ("", "", 'who_am_i; echo "$JOB $STARTS $SLURM_RESTART_COUNT"', "7_1 3 2"),
        ("ArrayJobId=7 ArrayTaskId=1 ", "", 'who_am_i; echo "$JOB"', "7"),
        ("", "", 'echo "[$(no_way_back)]"', "[]"),
        ("JobState=RUNNING", "JobState=SIGNALING", 'echo "[$(no_way_back)]"', "[]"),
        ("JobState=RUNNING", "JobState=CANCELLED", "no_way_back", "this job is at its end (CANCELLED)"),
        ("JobState=RUNNING", "JobState=COMPLETING", "no_way_back", "this job is at its end (COMPLETING)"),
        ("Requeue=1", "Requeue=0", "no_way_back", "this job may not be queued again (--no-requeue): submit it again"),
        ("", "", "preempted || echo no", "no"),
        ("PreemptTime=None", "PreemptTime=2026-11-30T05:01:22", "preempted && echo yes", "yes"),
        ("PreemptTime=None", "PreemptTime=2026-11-30T05:01:20", "preempted || echo no", "no"),  # of an earlier start
        ("", "", 'who_am_i; echo "$SLURM_GPUS_PER_NODE"', "8"),
        ("gres:gpu:8", "gres/gpu:h100:4", 'who_am_i; echo "$SLURM_GPUS_PER_NODE"', "4"),
        ("gres:gpu:8", "gres:gpu:h100", 'who_am_i; echo "$SLURM_GPUS_PER_NODE"', "1"),
        ("gres:gpu:8", "gres:gpu", 'who_am_i; echo "$SLURM_GPUS_PER_NODE"', "1"),
        ("gres:gpu:8", "gres:shard:2", 'who_am_i; echo "${SLURM_GPUS_PER_NODE:-none}"', "none"),
        ("gres:gpu:8", "gres:gpu:8,gres:gpu:2", "RANKS_PER_NODE=3; who_am_i; echo ok", "ok"),
    ],
)
def test_what_slurms_record_says_counts(old, new, code, expected, tmp_path):
    done = with_record(RECORDS.replace(old, new, 1) if old else RECORDS, code, tmp_path, SLURM_RESTART_COUNT="7",
                       SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="3", SLURM_GPUS_PER_NODE="5")  # fmt: skip
    assert done.stdout.startswith(expected), f"{done.stdout}\n{done.stderr}"


def test_a_record_that_does_not_come_is_no_answer(tmp_path):
    assert with_record("", "who_am_i", tmp_path).returncode == 2
    assert with_record("", "no_way_back && echo allowed", tmp_path).stdout == ""
    assert with_record("", "preempted || echo no", tmp_path).stdout == "no\n"


def test_what_a_submitter_left_is_forgotten_and_what_says_which_job_this_is_stays(tmp_path):
    stays = {
        "SLURM_CONF": "/c",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": "/",
        "PATH": "/",
    }
    goes = dict.fromkeys(("SLURM_NTASKS", "SLURM_MEM_PER_CPU", "SLURM_TRES_PER_TASK", "SQUEUE_STATES", "RANK"), "1")
    done = shell("forget_submitter; compgen -e", **goes, **{**stays, "PATH": "/usr/bin:/bin"})
    names = set(done.stdout.split())
    assert set(stays) <= names and not names & set(goes)


def test_all_scripts_find_the_repository_in_the_same_way():
    lookups = {path.name: re.search(r"(?s)\nif \[\[ -z \$\{MEGATRON_JQ_HOME.*?common\.sh\"\n", path.read_text())
               for path in SLURM.glob("*.sbatch")}  # fmt: skip
    assert len(lookups) == 5 and len({match[0] for match in lookups.values()}) == 1
