"""CUDA kernels serve unasked only where their tests passed on a GPU."""

import types

import pytest
import torch
from longspan.kernels import blocks, merge, top
from longspan.kernels.cuda import standing
from longspan.kernels.cuda.standing import OVERRIDE, serves, use
from longspan.kernels.grid import Grid

ON_GPU = types.SimpleNamespace(is_cuda=True)
ON_CPU = torch.zeros(2)


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)


def test_nothing_unproven_serves(monkeypatch):
    monkeypatch.setattr(standing, "PROVEN", frozenset())
    assert not any(serves(name, ON_GPU) for name in standing.NAMES)


def test_proven_kernels_serve_where_they_can_be_compiled(monkeypatch):
    monkeypatch.setattr(standing, "PROVEN", frozenset({"top"}))
    monkeypatch.setattr(standing, "installed", lambda: True)
    assert serves("top", ON_GPU) and not serves("invert", ON_GPU) and not serves("top", ON_CPU)
    monkeypatch.setattr(standing, "installed", lambda: False)
    assert not serves("top", ON_GPU)


def test_what_doctor_says(monkeypatch):
    monkeypatch.setattr(standing, "PROVEN", frozenset({"top"}))
    monkeypatch.setattr(standing, "installed", lambda: True)
    remarks = {name: remark for name, _, remark in standing.standing()}
    assert remarks["top"] == "default on cuda"
    assert remarks["merge"] == "not proven on cuda: only with LONGSPAN_CUDA=merge"
    monkeypatch.setattr(standing, "installed", lambda: False)
    assert {remark for *_, remark in standing.standing()} == {"cuda-core is not installed"}


def test_asked_for(monkeypatch):
    with use("invert", "merge"):
        assert serves("invert", ON_GPU) and not serves("top", ON_GPU)
        assert not serves("invert", ON_CPU)
        with use():
            assert not serves("invert", ON_GPU)
    monkeypatch.setenv(OVERRIDE, " top, merge")
    assert serves("top", ON_GPU) and serves("merge", ON_GPU) and not serves("invert", ON_GPU)
    monkeypatch.setattr(standing, "installed", lambda: True)
    remarks = {name: remark for name, _, remark in standing.standing()}
    assert remarks["top"].endswith("top, merge") and remarks["invert"] == "not asked for"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="'topp'; there are top, invert, merge"), use("topp"):
        pass
    monkeypatch.setenv(OVERRIDE, "merge,sort")
    with pytest.raises(ValueError, match="'sort'"):
        serves("merge", ON_GPU)


def test_who_asks_gets_them(shim, monkeypatch):
    """The public functions launch them, on tensors that pretend to be on a GPU."""
    shim.defines, shim.backwards = {}, False
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(12).reshape(3, 2, 2)
    chosen = blocks.Blocks.choose(ids, Grid.documents([0, 60], 5))
    parts, lse = scores.reshape(3, 5, 8), scores[:, :5]

    def everything():
        inverse = blocks.Inverse.of(chosen)
        ids = top.top_ids(scores, 4)
        return ids, inverse.groups_P, inverse.starts_CB1, *merge.merge_parts(parts, lse)

    expected = everything()
    for module in (top, blocks, merge):
        monkeypatch.setattr(module, "serves", lambda name, _: serves(name, ON_GPU))
    shim.launches.clear()
    with use():
        everything()
    assert shim.launches == []
    with use(*standing.NAMES):
        got = everything()
    launches = ["count_choices", "sum_chunks", "place_choices", "top_ids", "merge_fp32"]
    assert shim.launches == launches
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
