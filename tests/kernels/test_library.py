"""What can be known without a GPU: which reaches library kernels serve, how they are called.

With one, test_gpu.py compares their numbers.
"""

from itertools import pairwise

import pytest
import torch
from longspan.kernels.library import cudnn, flash
from longspan.kernels.library.shape import shape_of
from longspan.kernels.reach import Reach
from longspan.kernels.request import Request
from longspan.kernels.scoring import Scoring
from reference.visibility import visible_in

REACHES = {
    "documents": Reach.documents([0, 5, 5, 12]),
    "windows": Reach.documents([0, 5, 12], 3),
    "one": Reach.documents([0, 12]),
    "earlier shard": Reach.documents([0, 12]).rows(torch.arange(6, 12)).keys(torch.arange(2, 5)),
    "own shard": Reach.documents([0, 12]).rows(torch.arange(6, 12)).keys(torch.arange(6, 12)),
    "two chunks": Reach.documents([0, 12]).rows(torch.tensor([2, 3, 8, 9])),
    "nothing": Reach.documents([0, 6]).keys(torch.arange(0)),
}


def visible_by_shape(shape, rows: int, keys: int) -> torch.Tensor:
    mask = torch.zeros(1, rows, keys, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(shape.queries), pairwise(shape.keys), strict=True):
        for row in range(q1 - q0):
            last = k0 + row + 1 if shape.causal else k1
            first = k0 if shape.window is None else max(k0, last - shape.window)
            mask[0, q0 + row, shape.first + first : shape.first + last] = True
    return mask


@pytest.mark.parametrize("name", REACHES)
def test_a_shape_is_the_reach_in_other_words(name):
    reach = REACHES[name]
    shape, keys = shape_of(reach), 12
    assert (shape is None) == (name in ("two chunks", "nothing"))
    if shape is not None:
        visible = visible_in(reach.first_T, reach.last_T, keys)
        assert torch.equal(visible_by_shape(shape, len(reach), keys), visible)


ONE = ["one", "earlier shard", "own shard"]


@pytest.mark.parametrize(
    ("backend", "name"),
    [*((flash, name) for name in ["documents", "windows", *ONE]), *((cudnn, x) for x in ONE)],
)
def test_the_operators_take_these_arguments(backend, name):
    reach, scoring = REACHES[name], Scoring(0.3)
    q = torch.empty(len(reach), 4, 16, dtype=torch.bfloat16, device="meta")
    k = torch.empty(12, 2, 16, dtype=torch.bfloat16, device="meta")
    out, lse = backend.forward(q, k, k, reach, None, scoring, torch.float32)
    assert out.shape == q.shape and out.dtype == torch.float32 and lse.shape == q.shape[:2]
    grads = backend.backward(out, q, k, k, out, lse, None, reach, None, scoring)
    for grad, x in zip(grads[:3], (q, k, k), strict=True):
        assert grad.shape == x.shape and grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": torch.device("cpu")}, "CUDA"),
        ({"dtype": torch.float32}, "bf16"),
        ({"scoring": Scoring(1.0, softcap=2.0)}, "soft cap"),
        ({"dlse": True}, "gradient of the lse"),
        ({"value_dim": 64}, "one head dim"),
        ({"dim": 320, "value_dim": 320}, "one head dim"),
        ({"reach": REACHES["two chunks"]}, "neither"),
    ],
)
@pytest.mark.parametrize("backend", [flash, cudnn])
def test_what_they_do_not_serve_is_said(backend, change, words):
    request = {
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
        "heads": 4,
        "groups": 2,
        "dim": 128,
        "value_dim": 128,
        "reach": REACHES["one"],
        "blocks": None,
        "scoring": Scoring(1.0),
    }
    assert backend.refuses(Request(**request)) is None
    assert words in backend.refuses(Request(**(request | change)))


def test_cudnn_serves_one_document_without_a_window():
    shape = (torch.device("cuda"), torch.bfloat16, 4, 2, 128, 128)
    for name in ("documents", "windows"):
        request = Request(*shape, REACHES[name], None, Scoring(1.0))
        assert flash.refuses(request) is None
        assert "one document" in cudnn.refuses(request)
