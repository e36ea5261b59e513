from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from longspan.attention import infllm_v2
from longspan.attention.documents import Documents
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.probe import Probe
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.kernels.selection_plan import SelectionPlan
from longspan.kernels.windows import Windows
from pydantic import ValidationError
from reference.infllm_v2 import naive_seen
from reference.visibility import chosen
from reference.window import naive_layer
from support.mechanisms import (
    context,
    gradients,
    halves,
    inputs,
    make,
    positions_of,
    run,
    site,
    turned,
)
from support.memory import peak_growth

CU = [0, 1, 4, 11, 70, 85, 149]
LENGTHS = torch.tensor([b - a for a, b in pairwise(CU) for _ in range(a, b)])
SMALL = {"kind": "infllm_v2", "block": 8, "count": 2, "initial": 1, "local": 2, "coarse": 2,
         "compress_length": 4, "compress_stride": 2, "dense_below": 0}  # fmt: skip
VARIANTS = [
    {},
    {"dense_below": 15},
    {"dense_below": 60, "count": 1},
    {"coarse": 0, "initial": 0, "local": 1},
    {"coarse": 4, "count": 0, "initial": 2, "local": 1, "dense_below": 16},
    {"block": 16, "compress_length": 16, "compress_stride": 4, "count": 1, "local": 1},
]


def twin(layer, given, cu=CU, **options):
    """Output and gradients of hidden, q, k, v and all parameters, by automatic differentiation."""
    leaves, settings = given.leaves(), layer.mechanism.settings
    out = naive_layer(
        *leaves,
        cu,
        lambda q, k, scale: naive_seen(q, k, cu, settings, scale),
        sink_H=layer.sink_H,
        **options,
    )
    return out.detach(), gradients(out, given.dout, [*leaves, *layer.parameters()])


def choice(layer, given, cu, rows=None):
    """The block numbers that a layer chose, [rows, heads, blocks]."""
    q = given.q if rows is None else given.q[rows]
    ctx = context(cu, rows, kept={})
    with torch.no_grad():
        layer(given.hidden, q, given.k, given.v, ctx)
    return ctx.kept["blocks"].ids_QCN


@pytest.mark.parametrize(
    ("heads", "groups", "options"),
    [(2, 2, {}), (4, 2, {"sinks": True, "scale": 0.8}), (4, 1, {})],
    ids=str,
)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_outputs_and_gradients_equal_the_twin(changes, heads, groups, options):
    where = site(heads, groups)
    layer, given = make(SMALL | changes, where, **options), inputs(CU[-1], where)
    assert not layer.needs_hidden
    out, grads = run(layer, given, context(CU))
    scale = {"scale": options["scale"]} if options else {}
    want, want_grads = twin(layer, given, **scale)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    names = ["hidden", *"qkv", *(name for name, _ in layer.named_parameters())]
    for name, got, expected in zip(names, grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_chosen_blocks_are_those_of_the_twin(changes):
    where = site()
    layer, given = make(SMALL | changes, where), inputs(CU[-1], where)
    settings = layer.mechanism.settings
    position = positions_of(CU)
    q, k = turned(given.q, position), turned(given.k, position)
    long = (settings.dense_below <= LENGTHS).nonzero()[:, 0]
    want = naive_seen(q, k, CU, settings, 8**-0.5)[:, long]
    ids, grid = choice(layer, given, CU), Grid.documents(CU, settings.block)
    assert bool((ids[settings.dense_below > LENGTHS] == -1).all())
    ids = ids[long]
    got = chosen(ids, grid.starts_B1, torch.arange(len(long)), 4, CU[-1])
    assert torch.equal(got & (torch.arange(CU[-1]) <= long[:, None]), want)
    assert bool((want[0] != want[2]).any()) == (settings.count > 0)


def test_a_block_has_the_best_of_its_five_windows():
    """Of windows of 32 and 16, block j of 64 has 4 j - 1 to 4 j + 3; a pool of 5 by 4, padded."""
    cu = [0, 1000]
    windows, grid = Windows.documents(cu, 32, 16), Grid.documents(cu, 64)
    over = SelectionPlan.of(windows, grid, Reach.documents(cu), None).overlapping
    for block, (first, last) in enumerate(zip(over.first_Q, over.last_Q, strict=True)):
        assert int(first) == max(0, 4 * block - 1)
        assert int(last) == min(4 * block + 4, len(windows))
    # Mass on one window at a time: the blocks that it overlaps win, and no others.
    where = site(1, 1, dim=2, hidden=2)
    settings = {"kind": "infllm_v2", "count": 2, "initial": 0, "local": 1, "dense_below": 0}
    layer, given = make(settings | {"coarse": 0}, where), inputs(1000, where)
    given.q[:] = torch.tensor([1.0, 0.0])
    for window in (0, 3, 4, 6, 7, 11, 20, 58):
        given.k[:] = 0
        given.k[16 * window + 8 : 16 * window + 24] = torch.tensor([1e3, 0.0])
        ctx = context(cu, torch.tensor([999]), turns=False, kept={})
        with torch.no_grad():
            layer(None, given.q[999:], given.k, given.v, ctx)
        got = set(ctx.kept["blocks"].ids_QCN[0, 0].tolist())
        best = [b for b in range(15) if 4 * b - 1 <= window <= 4 * b + 3]
        # Of three neighbouring windows with the mass the middle one has most: it alone decides.
        assert set(best) <= got, (window, got)


def test_the_preset_has_the_released_kernels_33_local_blocks_of_96():
    where = site(1, 1, dim=2, hidden=2, dtype=torch.float32)
    rows = torch.tensor([8191])
    given = inputs(8192, where, dtype=torch.float32)
    for settings, local in (({"preset": "minicpm4"}, 33), ({}, 32)):
        layer = make({"kind": "infllm_v2", **settings}, where)
        assert layer.mechanism.rule.total == 96 and layer.mechanism.rule.initial == 1
        assert layer.mechanism.rule.local == local
        ids = choice(layer, given, [0, 8192], rows)[0, 0].tolist()
        assert len(set(ids)) == 96 and {0, *range(128 - local, 128)} <= set(ids)
    changed = make({"kind": "infllm_v2", "preset": "minicpm4", "count": 5}, where)
    assert changed.mechanism.rule.total == 39


def test_documents_of_8191_tokens_are_dense_and_of_8192_sparse():
    where = site(1, 1, dim=4, hidden=2, dtype=torch.float32)
    given = inputs(8192 + 8191, where, dtype=torch.float32)
    rows = torch.cat([torch.arange(8000, 8192), torch.arange(16200, 16383)])
    cu = [0, 8192, 16383]
    layer = make({"kind": "infllm_v2", "count": 0, "local": 1}, where)
    dense, sparse = (
        x(None, given.q[rows], given.k, given.v, context(cu, rows))
        for x in (make({"kind": "dense"}, where), layer)
    )
    torch.testing.assert_close(sparse[192:], dense[192:], atol=1e-6, rtol=0)
    assert bool(((sparse - dense)[:192].abs().amax(-1) > 1e-4).all())


def test_a_growing_document_counts_as_what_it_will_be():
    """So that generation goes on as it began."""
    where, cu = site(), [0, 100]
    given, settings = inputs(100, where), SMALL | {"dense_below": 101}
    outs = []
    for below, final in ((101, None), (101, 101), (0, None)):
        layer = make(settings | {"dense_below": below}, where)
        ctx = replace(context(cu), documents=Documents(cu, final=final))
        outs.append(run(layer, given, ctx)[0])
    short, long, sparse = outs
    assert torch.equal(long, sparse) and not torch.allclose(short, long)


@pytest.mark.parametrize("below", [1, 15, 65])
def test_one_call_where_all_documents_are_alike(below, monkeypatch):
    """And with few blocks to choose from, or only short documents, attention is dense."""
    where, calls = site(), []
    layer = make(SMALL | {"dense_below": below, "count": 8}, where)
    given, ctx = inputs(CU[-1], where), context(CU)
    attend = ctx.cp.attend
    monkeypatch.setattr(ctx.cp, "attend", lambda *a, **k: calls.append(a) or attend(*a, **k))
    got = run(layer, given, ctx)
    assert len(calls) == (2 if below == 15 else 1)
    dense = run(make({"kind": "dense"}, where), given, context(CU))
    for one, other in zip([got[0], *got[1]], [dense[0], *dense[1]], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_keys_outside_the_selection_have_no_gradient():
    where, cu = site(2, 1), [0, 100]
    layer, given = make(SMALL, where), inputs(100, where)
    given.dout[:-1] = 0
    ids = choice(layer, given, cu)[-1, 0].tolist()
    dk, dv = run(layer, given, context(cu))[1][2:4]
    for key in range(100):
        seen = key // 8 in ids
        assert bool((dk[key] != 0).any()) == seen and bool((dv[key] != 0).any()) == seen


@pytest.mark.parametrize("changes", VARIANTS[:3], ids=str)
def test_a_changed_token_reaches_later_tokens_of_its_document_only(changes):
    where = site()
    layer, given = make(SMALL | changes, where), inputs(CU[-1], where)
    before, before_ids = run(layer, given, context(CU))[0], choice(layer, given, CU)
    row = torch.arange(CU[-1])
    for at in (0, 5, 11, 30, 69, 100):
        other = inputs(CU[-1], where)
        for x in (other.hidden, other.q, other.k, other.v):
            x[at] += 1.0
        after = run(layer, other, context(CU))[0]
        begin, end = next((a, b) for a, b in pairwise(CU) if a <= at < b)
        others = torch.cat([row[:begin], row[end:]])
        assert torch.equal(before[others], after[others])
        # Products of rows that chose the same block may round by how many they are.
        early = slice(begin, at)
        torch.testing.assert_close(before[early], after[early], atol=1e-14, rtol=1e-14)
        same = torch.cat([row[:at], row[end:]])
        assert torch.equal(before_ids[same], choice(layer, other, CU)[same])
        assert not torch.equal(before[at], after[at])


def test_the_last_rows_alone_are_those_of_the_whole():
    where = site()
    given = inputs(CU[-1], where)
    for below, rows in ((0, torch.arange(140, 149)), (16, torch.arange(75, 149))):
        layer = make(SMALL | {"dense_below": below}, where, sinks=True)
        whole = run(layer, given, context(CU))[0]
        part = layer(given.hidden, given.q[rows], given.k, given.v, context(CU, rows))
        torch.testing.assert_close(part, whole[rows], atol=1e-12, rtol=0)


def test_the_second_pass_sees_what_the_first_one_chose(monkeypatch):
    where = site()
    layer, given, ctx = make(SMALL, where), inputs(CU[-1], where), context(CU, kept={})
    with torch.no_grad():
        first = layer(given.hidden, given.q, given.k, given.v, ctx)
    monkeypatch.setattr(infllm_v2, "select_blocks", None)
    monkeypatch.setattr(infllm_v2, "pool", None)
    assert torch.equal(run(layer, given, ctx)[0], first)


def test_tensor_ranks_together_are_one():
    where, settings = site(4, 2), SMALL | {"dense_below": 15}
    layer, given = make(settings, where), inputs(CU[-1], where)
    out, (_, *grads) = run(layer, given, context(CU))
    parts = []
    for half, share in halves(where, given):
        parts.append(run(make(settings, half), share, context(CU)))
    found = [[part[0], *part[1][1:]] for part in parts]
    for one, other, expected in zip(*found, [out, *grads], strict=True):
        torch.testing.assert_close(torch.cat([one, other], 1), expected, atol=1e-10, rtol=0)


def test_the_probe_sees_what_queries_see():
    where = site()
    for below in (0, 15, 1000):
        layer, given = make(SMALL | {"dense_below": below}, where), inputs(CU[-1], where)
        probe = Probe(1, 1000, torch.device("cpu"))
        run(layer, given, context(CU, probe=probe))
        q, k = (turned(x, positions_of(CU)) for x in (given.q, given.k))
        seen_HTT = naive_seen(q, k, CU, layer.mechanism.settings, 8**-0.5)
        kept_HT = seen_HTT.sum(-1) / (positions_of(CU) + 1)
        assert probe.table()[0].get("kept", 1.0) == pytest.approx(float(kept_HT.mean()))


def test_64k_tokens_in_bounded_memory():
    tokens, where = 2**16, site(1, 1, dim=16, hidden=16, dtype=torch.float32)
    layer = make({"kind": "infllm_v2", "count": 12, "local": 3}, where)
    given = inputs(tokens, where, dtype=torch.float32)
    ctx = context([0, tokens - 9000, tokens - 1000, tokens])
    with peak_growth() as grown:
        run(layer, given, ctx)
    assert grown.mib < 512, grown.mib


def test_wrong_settings_are_refused():
    for wrong in ({"block": 0}, {"local": 0}):
        with pytest.raises(ValidationError):
            AttentionSettings.model_validate({"mechanism": {"kind": "infllm_v2", **wrong}})
