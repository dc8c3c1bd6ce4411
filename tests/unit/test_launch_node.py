"""launch/slurm/node.py and the shell scripts, as far as no Slurm is needed."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "launch" / "slurm"
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh"), *(REPOSITORY / "tests" / "slurm").glob("*.sh")])


def load_node():
    spec = importlib.util.spec_from_file_location("node", SLURM / "node.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_clean():
    others = [REPOSITORY / ".ci" / "run", REPOSITORY / "tests" / "run.sh"]
    paths = [str(path.relative_to(REPOSITORY)) for path in [*SCRIPTS, *others]]
    done = subprocess.run(["shellcheck", "-x", "-P", ".", *paths], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_container_gets_the_mounts_and_what_ranks_must_see():
    settings = {
        "PATH": os.environ["PATH"], "MEGATRON_JQ_HOME": "/repo", "SLURM_SUBMIT_DIR": "/here", "RUN_DIR": "/data/run",
        "CONTAINER_IMAGE": "image.sqsh", "CONTAINER_MOUNTS": "/d:/d", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/repo",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euc", '. "$0"; set_up_software; printf "%s\n" "$PYTHON" "${CONTAINER[@]}"', SLURM / "common.sh"],
        env=settings, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "python3",
        "--container-image=image.sqsh",
        "--container-workdir=/here",
        "--container-mounts=/repo:/repo,/here:/here,/data/run:/data/run,/d:/d",
        "--container-env=NCCL_DEBUG,PYTHONPATH",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_that_parses(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


def test_the_cause_is_the_rank_that_failed_by_itself():
    node = load_node()
    codes = [node.as_shell_code(code) for code in (3, -signal.SIGTERM, -signal.SIGKILL)]
    assert codes == [3, 143, 137]
    assert min(codes, key=node.failure_class) == 137
    assert min([143, 3], key=node.failure_class) == 3
    assert min([3, 2], key=node.failure_class) == 2


def one_task(tmp_path: Path, package: str, launcher: str = "tasks", **variables: str) -> tuple[subprocess.Popen, Path]:
    """node.py as one task of two, over a package megatron_jq whose __main__ is `package`."""
    fake = tmp_path / "fake" / "megatron_jq"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(package)
    records = tmp_path / "the logs"
    (records / "failures").mkdir(parents=True)
    (records / "agents").mkdir()
    slurm = {
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2",
        "SLURMD_NODENAME": "n2", "PYTHONPATH": str(tmp_path / "fake"), **variables,
    }  # fmt: skip
    flags = ["--launcher", launcher, "--ranks-per-node", "1", "--records", str(records), "--", "train", "--q", "0.5"]
    process = subprocess.Popen(
        [sys.executable, str(SLURM / "node.py"), *flags], env={**os.environ, **slurm}, cwd=tmp_path,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, records


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_rank_gets_its_place_and_its_flags(tmp_path):
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE"
    process, records = one_task(
        tmp_path, f"import os, sys\nprint([os.environ[n] for n in '{names}'.split()], sys.argv[1:])\n"
    )
    assert process.communicate(timeout=60)[0] == "['1', '2', '0', '1'] ['train', '--q', '0.5']\n"
    assert process.returncode == 0 and list((records / "failures").iterdir()) == []


def test_a_failing_rank_leaves_a_record(tmp_path):
    process, records = one_task(tmp_path, "import os\nos.kill(os.getpid(), 9)\n")
    assert process.wait(60) == 137
    kind, _, code, rank, node = (records / "failures" / "1").read_text().split()
    assert (kind, code, rank, node) == ("0", "137", "1", "n2")


STUBBORN = """
import pathlib, signal, time
pathlib.Path("started").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.02)
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
pathlib.Path("ready").touch()
end = time.monotonic() + 60
while not seen and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.6)
print(len(seen))
"""


def test_usr1_waits_for_the_ranks_handler_and_comes_once(tmp_path):
    process, records = one_task(tmp_path, STUBBORN)
    agent = records / "agents" / "n2.0"
    until(lambda: agent.exists() and agent.read_text().strip() and (tmp_path / "started").exists())
    assert int(agent.read_text()) == process.pid
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)  # time enough for a signal that would not wait to kill the rank
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert process.communicate(timeout=60)[0] == "1\n" and process.returncode == 0


def test_a_rank_goes_with_its_task(tmp_path):
    process, _ = one_task(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    rank = int(process.stdout.readline())
    process.kill()
    process.wait(10)
    until(lambda: not Path(f"/proc/{rank}").exists() or "Z (zombie)" in Path(f"/proc/{rank}/status").read_text())


SLOW_TO_SAVE = """
import pathlib, signal, time
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
pathlib.Path("ready").touch()
while not seen:
    time.sleep(0.02)
time.sleep(4)
pathlib.Path("saved").touch()
"""


@pytest.mark.parametrize("launcher", ["torchrun", "tasks"])
def test_after_sigterm_ranks_have_all_the_time_that_slurm_gives(tmp_path, launcher):
    """torchrun's own patience, 30 s by default and 1 s here, does not end a step of 65 to 135 s."""
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1",
                   "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    process, records = one_task(tmp_path, SLOW_TO_SAVE, launcher, **environment)
    until(lambda: (tmp_path / "ready").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, list((records / "failures").iterdir())
    assert (tmp_path / "saved").exists()
    assert [path.name for path in (records / "told").iterdir()] == ["n2.0"]


def test_sigterm_before_there_are_ranks_ends_the_task_as_told(tmp_path):
    # The meeting point answers nobody: this node waits for the other one.
    environment = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    process, records = one_task(tmp_path, "", "torchrun", **environment)
    until(lambda: (records / "agents" / "n2.0").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert (records / "failures" / "1").read_text().startswith("2 ") and (records / "told" / "n2.0").exists()
