"""One cluster of two nodes for all files that want a real one; it takes seconds to start."""

import os
from pathlib import Path

import pytest
from longspan.redact import HIDDEN_NAMES
from support.cluster import LocalCluster
from support.cluster_runs import local_reference
from support.nodes import World

_started: list[LocalCluster] = []


@pytest.fixture(scope="session")
def started_cluster():
    """The cluster as it is."""
    _started.append(LocalCluster())
    yield _started[0]
    _close()


def _close():
    while _started:
        _started.pop().close()


@pytest.hookimpl(trylast=True)  # the test's own fixtures go first
def pytest_runtest_teardown(item, nextitem):
    """The cluster goes with the last test of this folder: it would slow down those that follow."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _close()


@pytest.fixture(autouse=True)
def _nothing_stays_hidden():
    """Whoever takes secrets in this process says so in its environment, where others would see."""
    before = os.environ.pop(HIDDEN_NAMES, None)
    yield
    os.environ.pop(HIDDEN_NAMES, None)
    if before is not None:
        os.environ[HIDDEN_NAMES] = before


@pytest.fixture
def cluster(started_cluster):
    """The cluster with all of its nodes."""
    started_cluster.revive()
    return started_cluster


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """The documents of the runs."""
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="session")
def reference(started_cluster, texts, tmp_path_factory):
    """The tiny run by `longspan train`."""
    return local_reference(texts, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Makes a cluster up, by what its nodes have."""
    return lambda **nodes: World(monkeypatch, tmp_path, **nodes)
