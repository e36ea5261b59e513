from itertools import pairwise

import pytest
import torch
from longspan.attention import mean_keys
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.probe import Probe
from longspan.kernels.grid import Grid
from pydantic import ValidationError
from reference.moba import naive_seen
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

CU = [0, 1, 4, 11, 70, 86, 149]
VARIANTS = [(8, 3), (8, 1), (3, 4), (16, 2), (64, 2)]


def settings_of(block, count):
    return {"kind": "moba", "block": block, "count": count}


def twin(layer, given, block, count, **options):
    """Output and gradients of hidden, q, k, v and all parameters, by automatic differentiation."""
    leaves = given.leaves()
    out = naive_layer(
        *leaves,
        CU,
        lambda q, k, _: naive_seen(q, k, CU, block, count),
        sink_H=layer.sink_H,
        **options,
    )
    return out.detach(), gradients(out, given.dout, [*leaves, *layer.parameters()])


def choice(layer, given, cu, rows=None, turns=True):
    """The block numbers that a layer chose, [rows, query heads, blocks]."""
    q = given.q if rows is None else given.q[rows]
    ctx = context(cu, rows, turns, kept={})
    with torch.no_grad():
        layer(given.hidden, q, given.k, given.v, ctx)
    return ctx.kept["blocks"].ids_QCN


@pytest.mark.parametrize(
    ("heads", "groups", "options"),
    [(2, 2, {}), (4, 2, {"sinks": True, "scale": 0.8}), (4, 1, {})],
    ids=str,
)
@pytest.mark.parametrize(("block", "count"), VARIANTS)
def test_outputs_and_gradients_equal_the_twin(block, count, heads, groups, options):
    where = site(heads, groups)
    layer = make(settings_of(block, count), where, **options)
    given = inputs(CU[-1], where)
    assert not layer.needs_hidden
    out, grads = run(layer, given, context(CU))
    scale = {"scale": options["scale"]} if options else {}
    want, want_grads = twin(layer, given, block, count, **scale)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    names = ["hidden", *"qkv", *(name for name, _ in layer.named_parameters())]
    for name, got, expected in zip(names, grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("block", "count"), VARIANTS)
def test_each_query_head_chooses_the_blocks_of_the_twin(block, count):
    where = site()
    layer, given = make(settings_of(block, count), where), inputs(CU[-1], where)
    q, k = (turned(x, positions_of(CU)) for x in (given.q, given.k))
    want = naive_seen(q, k, CU, block, count)
    ids = choice(layer, given, CU)
    assert ids.shape == (CU[-1], 4, count)
    row = torch.arange(CU[-1])
    got = chosen(ids, Grid.documents(CU, block).starts_B1, row, 4, CU[-1])
    assert torch.equal(got & (row <= row[:, None]), want)
    assert bool((want[0] != want[1]).any()) == (count > 1 and block < 64)


def test_one_block_is_the_own_one_and_not_dense():
    where, rows = site(), torch.arange(CU[-1])
    given = inputs(CU[-1], where)
    layer = make(settings_of(8, 1), where)
    own = torch.searchsorted(Grid.documents(CU, 8).starts_B1, rows, right=True) - 1
    assert torch.equal(choice(layer, given, CU), own[:, None, None].expand(-1, 4, 1).int())
    dense = run(make({"kind": "dense"}, where), given, context(CU))[0]
    assert not torch.allclose(run(layer, given, context(CU))[0], dense)


def test_as_many_blocks_as_there_are_is_dense():
    where = site()
    given = inputs(CU[-1], where)
    all_blocks, fewer, dense = (
        run(make(settings, where), given, context(CU))
        for settings in (settings_of(8, 8), settings_of(8, 7), {"kind": "dense"})
    )
    for one, other in zip([all_blocks[0], *all_blocks[1]], [dense[0], *dense[1]], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert not torch.allclose(fewer[0], dense[0])


def test_the_gate_tells_products_apart_that_are_one_in_half_precision():
    where = site(1, 1, dim=2, hidden=2, dtype=torch.bfloat16)
    layer, given = make(settings_of(4, 2), where), inputs(12, where, dtype=torch.bfloat16)
    given.q[:] = 1.0
    given.k[:4], given.k[4:8] = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0**-10])
    ids = choice(layer, given, [0, 12], torch.tensor([10, 11]), turns=False)
    assert ids[:, 0].tolist() == [[1, 2]] * 2
    # Shares of a softmax would both be 0.
    given.k[:4], given.k[4:8], given.k[8:] = -3e3, -1e3, 3e3
    ids = choice(layer, given, [0, 12], torch.tensor([10, 11]), turns=False)
    assert ids[:, 0].tolist() == [[1, 2]] * 2


def test_of_equal_products_the_lowest_block_is_chosen():
    where = site(1, 1, dim=2, hidden=2)
    layer, given = make(settings_of(4, 2), where), inputs(16, where)
    given.k[:] = 1.0
    assert choice(layer, given, [0, 16], torch.tensor([15]), turns=False).tolist() == [[[0, 3]]]


def test_keys_outside_the_selection_have_no_gradient():
    where, cu = site(2, 1), [0, 100]
    layer, given = make(settings_of(8, 3), where), inputs(100, where)
    given.dout[:-1] = 0
    ids = choice(layer, given, cu)[-1].flatten().tolist()
    dk, dv = run(layer, given, context(cu))[1][2:4]
    for key in range(100):
        seen = key // 8 in ids
        assert bool((dk[key] != 0).any()) == seen and bool((dv[key] != 0).any()) == seen


@pytest.mark.parametrize("block", [3, 16])
def test_a_changed_token_reaches_later_tokens_of_its_document_only(block):
    where = site()
    layer, given = make(settings_of(block, 3), where), inputs(CU[-1], where)
    before, before_ids = run(layer, given, context(CU))[0], choice(layer, given, CU)
    row = torch.arange(CU[-1])
    for at in (0, 5, 11, 30, 69, 100, 148):
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
    where, rows = site(), torch.arange(140, 149)
    layer, given = make(settings_of(8, 3), where, sinks=True), inputs(CU[-1], where)
    whole = run(layer, given, context(CU))[0]
    part = layer(given.hidden, given.q[rows], given.k, given.v, context(CU, rows))
    torch.testing.assert_close(part, whole[rows], atol=1e-12, rtol=0)


def test_the_second_pass_sees_what_the_first_one_chose(monkeypatch):
    where = site()
    layer, given = make(settings_of(8, 3), where), inputs(CU[-1], where)
    ctx = context(CU, kept={})
    with torch.no_grad():
        first = layer(given.hidden, given.q, given.k, given.v, ctx)
    monkeypatch.setattr(mean_keys, "select_blocks", None)
    assert torch.equal(run(layer, given, ctx)[0], first)


def test_tensor_ranks_together_are_one():
    where, settings = site(4, 2), settings_of(8, 3)
    layer, given = make(settings, where), inputs(CU[-1], where)
    out, (_, *grads) = run(layer, given, context(CU))
    parts = []
    for half, share in halves(where, given):
        parts.append(run(make(settings, half), share, context(CU)))
    found = [[part[0], *part[1][1:]] for part in parts]
    for one, other, expected in zip(*found, [out, *grads], strict=True):
        torch.testing.assert_close(torch.cat([one, other], 1), expected, atol=1e-10, rtol=0)


def test_the_probe_sees_what_queries_see():
    where, probe = site(), Probe(1, 1000, torch.device("cpu"))
    layer, given = make(settings_of(8, 3), where), inputs(CU[-1], where)
    run(layer, given, context(CU, probe=probe))
    q, k = (turned(x, positions_of(CU)) for x in (given.q, given.k))
    kept_HT = naive_seen(q, k, CU, 8, 3).sum(-1) / (positions_of(CU) + 1)
    assert probe.table()[0]["kept"] == pytest.approx(float(kept_HT.mean()))


def test_64k_tokens_in_bounded_memory():
    tokens, where = 2**16, site(1, 1, dim=16, hidden=16, dtype=torch.float32)
    layer = make(settings_of(64, 16), where)
    given = inputs(tokens, where, dtype=torch.float32)
    ctx = context([0, tokens - 1000, tokens])
    with peak_growth() as grown:
        run(layer, given, ctx)
    assert grown.mib < 512, grown.mib


def test_wrong_settings_are_refused():
    for wrong in ({"block": 0}, {"count": 0}, {"local": 1}):
        with pytest.raises(ValidationError):
            AttentionSettings.model_validate({"mechanism": {"kind": "moba", **wrong}})
