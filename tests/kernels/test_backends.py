import logging
import types
from dataclasses import replace

import pytest
import torch
from longspan.kernels import backends
from longspan.kernels.attend import attend
from longspan.kernels.backends import OVERRIDE, TABLE, choose, selection_steps, standing, use
from longspan.kernels.blocks import Blocks
from longspan.kernels.eager import backend as eager
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.kernels.request import DEBUG, Request
from longspan.kernels.scoring import Scoring

REACH = Reach.documents([0, 4])


def request_on(device: str, dtype=torch.float32) -> Request:
    return Request(torch.device(device), dtype, 4, 2, 8, 8, REACH, None, Scoring(1.0))


def test_a_kernel_that_no_gpu_has_run_is_no_default(caplog, monkeypatch):
    backends._log_once.cache_clear()
    unproven = [replace(b, proven=b.proven if b.name == "eager" else frozenset()) for b in TABLE]
    monkeypatch.setattr(backends, "TABLE", unproven)
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
        ("fastest", "no attention backend 'fastest'; there are cudnn, triton, flash, eager"),
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
    assert rows["flash"] == "choice 2 on cuda, for what it can serve"
    assert {r for n, _, r in standing("cpu") if n in ("cudnn", "flash")} == {"not used on cpu"}


def test_the_doctor_knows_what_was_asked_for(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "eager")
    rows = {name: remark for name, _, remark in standing("cuda")}
    assert rows["eager"] == f"{OVERRIDE}=eager" and rows["cudnn"] == "not asked for"
    monkeypatch.setenv(OVERRIDE, "fastest")
    assert [*standing("cpu")][-1][:2] == ("fastest", "no such backend")


def test_a_selection_is_scored_by_what_is_proven_or_asked_for():
    q = torch.zeros(4, 2, 8)
    scorer, of_blocks = selection_steps(q)
    assert {scorer.__module__.split(".")[-2], of_blocks.__module__.split(".")[-2]} == {"eager"}
    with use("triton"):
        assert selection_steps(q)[1].__module__.split(".")[-2] == "triton"
    with use("fastest"), pytest.raises(ValueError, match="no attention backend 'fastest'"):
        selection_steps(q)
    on_gpu = types.SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, shape=(4, 2, 8)
    )
    assert selection_steps(on_gpu)[0].__module__.split(".")[-2] == "triton"
    on_gpu.dtype = torch.float64
    assert selection_steps(on_gpu)[0].__module__.split(".")[-2] == "eager"


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
