"""Kernels of the Triton backend, with every buffer that is not written full of NaN."""

import pytest
import torch
from longspan.kernels import backends


@pytest.fixture(autouse=True)
def by_triton():
    """Calls of `attend` are served by Triton."""
    with backends.use("triton"):
        yield


@pytest.fixture(autouse=True, scope="package")
def poisoned():
    """`torch.empty` gives NaN; torch does that while algorithms are to be deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(before)
