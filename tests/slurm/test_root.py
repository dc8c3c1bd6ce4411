"""Another Slurm than this machine's: what cannot be made or used says so and leaves nothing half made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import HERE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root file systems are made by root")
needs_debootstrap = pytest.mark.skipif(
    shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="debootstrap is not installed"
)


def make_root(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", **variables}
    command = [str(HERE / "make_root.sh"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def test_a_root_that_is_there_is_left_as_it_is_and_another_folder_is_refused(tmp_path):
    outcome = make_root(tmp_path)
    assert outcome.returncode == 1 and f"error: {tmp_path} is there and holds no Slurm" in outcome.stderr
    program = tmp_path / "usr" / "sbin" / "slurmctld"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    assert make_root(tmp_path).returncode == 0 and program.stat().st_size == 0


@needs_root
def test_without_debootstrap_it_says_how_to_get_it(tmp_path):
    for tool in ("realpath", "dirname", "bash"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    outcome = make_root(tmp_path / "root", PATH=str(tmp_path))
    assert outcome.returncode == 1 and "apt-get install debootstrap" in outcome.stderr, outcome.stderr


@needs_root
@needs_debootstrap
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MIRROR": "http://127.0.0.1:9/debian"}, "Failed getting release file http://127.0.0.1:9/debian"),
        ({"SECONDS_AT_MOST": "0.01"}, "not complete after 0.01 s"),
        ({"SUITE": "none"}, "debootstrap none ended with 1"),
    ],
)
def test_where_debootstrap_fails_its_words_are_shown_and_nothing_half_made_is_left(variables, said, tmp_path):
    outcome = make_root(tmp_path / "root", **variables)
    assert outcome.returncode == 1 and said in outcome.stderr, outcome.stderr
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_version_that_was_asked_for_is_not_silently_another(tmp_path):
    """pytest alone would test this machine's Slurm."""
    test = "tests/slurm/test_cluster.py::test_after_a_failure_nothing_is_left"
    environment = {**os.environ, "MEGATRON_JQ_SLURM_ROOT": str(tmp_path)}
    environment.pop("MEGATRON_JQ_IN_SLURM_ROOT", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test]
    tried = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert tried.returncode == 1 and "tests/slurm/in_root.sh starts the tests in it" in tried.stdout, tried.stdout
    started = subprocess.run([str(HERE / "in_root.sh")], env=environment, capture_output=True, text=True)
    assert started.returncode == 1 and f"{tmp_path} is there and holds no Slurm" in started.stderr, started.stderr
