import logging

import pytest
import torch
from longspan.kernels import backends
from longspan.kernels.attend import attend
from longspan.kernels.backends import OVERRIDE, TABLE, choose, standing, use
from longspan.kernels.blocks import Blocks
from longspan.kernels.eager import backend as eager
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.kernels.request import DEBUG, Request
from longspan.kernels.scoring import Scoring

REACH = Reach.documents([0, 4])


def request_on(device: str, dtype=torch.float32) -> Request:
    return Request(torch.device(device), dtype, 4, 2, 8, 8, REACH, None, Scoring(1.0))


def test_a_kernel_that_no_gpu_has_run_is_no_default(caplog):
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert choose(request_on("cuda", torch.bfloat16)) is eager
    (message,) = caplog.messages
    assert message.startswith("attention on cuda: eager (cudnn is not proven on cuda")


def test_a_backend_can_be_asked_for(monkeypatch):
    with use("eager"):
        assert choose(request_on("cpu")) is eager
    monkeypatch.setenv(OVERRIDE, "eager")
    assert choose(request_on("cuda")) is eager


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fastest", "no attention backend 'fastest'; there are cudnn, flash, triton, eager"),
        ("flash", "'flash' cannot serve this: it runs on CUDA devices"),
    ],
)
def test_one_that_cannot_serve_says_why(name, words):
    with use(name), pytest.raises(ValueError, match=words):
        choose(request_on("cpu"))


def test_no_backend_at_all():
    with pytest.raises(ValueError, match=r"float32 on mps; nearest are the devices cpu and cuda"):
        choose(request_on("mps"))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    triton = next(b for b in TABLE if b.name == "triton")
    assert triton.refuses(request_on("cuda")) == "triton is not installed"
    rows = {name: remark for name, _, remark in standing("cuda")}
    assert rows["triton"] == "triton is not installed"
    assert rows["flash"] == f"not proven on cuda: only with {OVERRIDE}=flash"
    assert rows["eager"] == "default on cuda"


def test_debugging_looks_at_the_numbers(monkeypatch):
    q, k = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8)
    bad = k.clone()
    bad[2, 1, 3] = float("nan")
    grid = Grid.documents([0, 4], 2)
    outside = Blocks(torch.full((4, 1, 1), 7, dtype=torch.int32), grid)
    attend(q, bad, k, REACH, scale=1.0)
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ValueError, match=r"k \[4, 2, 8\] has 1 NaN, the first at \[2, 1, 3\]"):
        attend(q, bad, k, REACH, scale=1.0)
    with pytest.raises(ValueError, match="block 7 is not in a grid of 2"):
        attend(q, k, k, REACH, outside, scale=1.0)
