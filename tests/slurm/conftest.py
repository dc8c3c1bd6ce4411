"""One cluster for all tests of this folder."""

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, leaves_nothing_behind, slurm_version, why_not

#: Set by in_root.sh.
ROOT, IN_ROOT = os.environ.get("MEGATRON_JQ_SLURM_ROOT"), "MEGATRON_JQ_IN_SLURM_ROOT" in os.environ


def pytest_report_header() -> str:
    """The version that is tested."""
    return (slurm_version() or "no Slurm") + (f" in {ROOT}" if IN_ROOT else "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a root of its own, the tests of this folder in which no Slurm takes part are left out."""
    folder = Path(__file__).resolve().parent
    apart = [item for item in items if folder in item.path.parents and "slurm" not in getattr(item, "fixturenames", ())]
    if IN_ROOT and apart:
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip where no cluster can be made. Where another version was asked for, that is a failure."""
    if ROOT and not IN_ROOT:
        pytest.fail("MEGATRON_JQ_SLURM_ROOT is set: tests/slurm/in_root.sh starts the tests in it")
    reason = why_not()
    if reason is not None:
        (pytest.fail if IN_ROOT else pytest.skip)(reason)


@pytest.fixture(scope="session")
def whole_cluster(slurm, tmp_path_factory):
    """Two nodes; afterwards nothing of them is left, whatever the tests did."""
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with leaves_nothing_behind(folder), Cluster(folder) as up:
        yield up


@pytest.fixture
def cluster(whole_cluster):
    """The same, for one test: the jobs of one that failed hold no node in the next."""
    yield whole_cluster
    whole_cluster.clear()
