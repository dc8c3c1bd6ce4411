"""The test cluster itself: whatever happens to it, nothing of it stays."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, leaves_nothing_behind, left_by

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("slurm")

BUSY = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path(sys.argv[1])) as cluster:
    cluster.run("sbatch", "--nodes=2", "--wrap", "srun sleep 600", cwd=Path(sys.argv[2]))
    cluster.until(lambda: "1.0" in cluster.run("squeue", "--steps", "--noheader").stdout, 60, "a running step")
    print("up", flush=True)
    time.sleep(600)
"""


def test_after_a_failure_nothing_is_left(tmp_path):
    folder = tmp_path / "cluster"
    with leaves_nothing_behind(folder):
        with pytest.raises(ZeroDivisionError), Cluster(folder) as cluster:
            cluster.kill_node("node2")
            raise ZeroDivisionError


def names(processes: list[psutil.Process]) -> set[str]:
    """Those of the processes that still are there: the cluster's own short commands come and go."""
    seen = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.add(process.name())
    return seen


def test_when_the_tester_is_killed_nothing_is_left(tmp_path):
    folder = tmp_path / "cluster"
    before = left_by(folder)
    tester = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(folder), str(tmp_path)],
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert tester.stdout.readline() == "up\n"
    inside = psutil.Process(tester.pid).children(recursive=True)
    assert {"slurmctld", "slurmd", "munged", "srun"} <= names(inside)
    assert len(left_by(folder)["processes"]) >= 5
    tester.kill()
    tester.communicate(timeout=30)
    _, alive = psutil.wait_procs(inside, timeout=30)
    assert not alive
    end = time.monotonic() + 30
    while left_by(folder) != before and time.monotonic() < end:  # the kernel takes a network away a moment later
        time.sleep(0.05)
    assert left_by(folder) == before
