import pytest
import torch
from longspan.tests.parallel.ranks import gloo_transport


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gloo_moves_what_the_transport_promises(worlds, dtype):
    results = worlds(2).run(gloo_transport, dtype)
    assert results[0] == ([1, 11, 21], [0, 1], [1.0] * 4)
    assert results[1] == ([0, 10, None], [0, 1], [3.0] * 4)
