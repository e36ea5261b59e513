"""Worlds of gloo ranks, shared by the tests of a file.

Not by all files: every process group that a test leaves behind keeps threads that poll.
"""

import os
import sys
from pathlib import Path

# Before torch: threads that wait for each other are slow where others work as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Spawned ranks unpickle test functions by module name.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    # Settled when Triton is first imported, which any test file may do.
    os.environ["TRITON_INTERPRET"] = "1"

from support import grid
from support.world import World


def pytest_report_header():
    """Which cases of the grids are drawn."""
    return f"grids: {grid.NAME}={grid.DRAW} (full: all cases)"


@pytest.fixture(scope="session", autouse=True)
def records(tmp_path_factory):
    """No test adds to the runs of the user, nor meets the user's clusters."""
    os.environ["LONGSPAN_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["LONGSPAN_CLUSTERS"] = str(tmp_path_factory.getbasetemp() / "no-clusters.yaml")


@pytest.fixture(scope="session")
def device():
    """Where tests of GPU kernels run; without a GPU the kernels are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def worlds():
    """`worlds(n)` is a World of n ranks."""
    started: dict[int, World] = {}

    def get(ranks: int) -> World:
        if ranks not in started or not started[ranks].alive:
            started[ranks] = World(ranks)
        return started[ranks]

    yield get
    for world in started.values():
        world.close()
