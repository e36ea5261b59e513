"""One cluster of two nodes for all files that want a real one; it takes seconds to start."""

import pytest
from support.cluster import LocalCluster


@pytest.fixture(scope="session")
def started_cluster():
    """The cluster as it is."""
    cluster = LocalCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(started_cluster):
    """The cluster with all of its nodes."""
    started_cluster.revive()
    return started_cluster
