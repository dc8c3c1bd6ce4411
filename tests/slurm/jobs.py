"""The tiny policy as jobs of the test cluster."""

import json
import sys
from pathlib import Path

from megatron_jq.records import MEASURED
from tests.e2e.launch import SMALL
from tests.slurm.cluster import Cluster

#: `megatron-jq train`'s flags, without the command and the device, which the jobs give themselves.
TINY = [flag for flag in SMALL if flag not in ("train", "--device", "cpu")]
#: A rehearsal on this machine: gloo, one thread a rank, little memory and disk.
REHEARSAL = {
    "DEVICE": "cpu",
    "VENV": str(Path(sys.executable).parents[1]),
    "OMP_NUM_THREADS": "1",
    "PREFLIGHT_FLAGS": "--min-free-disk 0.1 --min-shared-memory 0.01",
}


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def steps_on_record(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def submit(cluster: Cluster, folder: Path, run: str, *flags: str, ranks: int = 1, **variables: str) -> str:
    """train.sbatch, as shipped, from `folder`, on two nodes, RUN_DIR relative to it. Returns the job's number."""
    variables = {**REHEARSAL, "RUN_DIR": run, "RANKS_PER_NODE": str(ranks), **variables}
    return cluster.sbatch("train.sbatch", *flags, cwd=folder, **variables)


def finished(cluster: Cluster, number: str, folder: Path, seconds: float = 300) -> str:
    """Wait for a job that must succeed; what its batch script wrote."""
    job = cluster.wait(number, seconds)
    said = words(folder, number)
    assert (job.state, job.code) == ("COMPLETED", 0), f"{job}\n{said}\n{logs(folder)}"
    return said


def words(folder: Path, number: str) -> str:
    """What a batch script wrote."""
    return "".join(path.read_text() for path in sorted(folder.glob(f"*-{number}.out")))


def logs(folder: Path) -> str:
    """The ends of the ranks' logs, for a failing test to show."""
    return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(folder.rglob("node*.log")))
