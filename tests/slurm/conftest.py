"""One cluster for all tests of this folder."""

import pytest

from tests.slurm.cluster import Cluster, leaves_nothing_behind, why_not


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory):
    """Two nodes; afterwards nothing of them is left, whatever the tests did."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with leaves_nothing_behind(folder), Cluster(folder) as up:
        yield up


@pytest.fixture
def cluster(whole_cluster):
    """The same, for one test: the jobs of one that failed hold no node in the next."""
    yield whole_cluster
    whole_cluster.clear()
