import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings as how
from hypothesis import strategies as st
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.probe import Probe
from longspan.attention.sharded_heads import ShardedHeads
from longspan.attention.sharding import covered, residue
from pydantic import ValidationError
from reference.sharded_heads import naive_seen, sees
from reference.window import naive_layer
from support.accuracy import assert_as_good_as
from support.mechanisms import context, gradients, inputs, make, positions_of, run, site
from support.memory import peak_growth

CU = [0, 1, 4, 11, 70, 86, 149]
VARIANTS = [(8, 1, 2), (4, 2, 3), (3, 3, 8), (2, 1, 5), (64, 1, 2), (7, 2, 40)]


def settings_of(block, local, stride, shard_by="query_head"):
    return {"kind": "sharded_heads", "block": block, "local": local, "stride": stride,
            "shard_by": shard_by}  # fmt: skip


def mask(where, settings, cu=CU):
    """What the twin says that each of the rank's query heads sees, [H, T, T]."""
    by_query = settings["shard_by"] == "query_head"
    numbers = [where.first_head + head for head in range(where.heads)]
    heads = where.all_heads
    if not by_query:
        share = where.heads // where.groups
        numbers, heads = [number // share for number in numbers], heads // share
    sizes = settings["block"], settings["local"], settings["stride"]
    return naive_seen(cu, *sizes, numbers, heads)


def twin(layer, given, seen, dtype=torch.float64, **options):
    """Output and gradients of hidden, q, k, v and all parameters, by automatic differentiation."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in given.leaves()]
    sinks = [p.detach().to(dtype).requires_grad_() for p in layer.parameters()]
    sink_H = sinks[0] if sinks else None
    out = naive_layer(*leaves, CU, lambda *_: seen, sink_H=sink_H, **options)
    return out.detach(), gradients(out, given.dout.to(dtype), [*leaves, *sinks])


@pytest.mark.parametrize("shard_by", ["query_head", "kv_head"])
@pytest.mark.parametrize(
    ("heads", "groups", "options"),
    [(2, 2, {}), (4, 2, {"sinks": True, "scale": 0.8}), (6, 2, {"sinks": True}), (4, 1, {})],
    ids=str,
)
@pytest.mark.parametrize(("block", "local", "stride"), VARIANTS)
def test_outputs_and_gradients_equal_the_twin(
    block, local, stride, heads, groups, options, shard_by
):
    where, settings = site(heads, groups), settings_of(block, local, stride, shard_by)
    layer, given = make(settings, where, **options), inputs(CU[-1], where)
    assert not layer.needs_hidden
    out, grads = run(layer, given, context(CU))
    scale = {"scale": options["scale"]} if "scale" in options else {}
    want, want_grads = twin(layer, given, mask(where, settings), **scale)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    names = ["hidden", *"qkv", *(name for name, _ in layer.named_parameters())]
    for name, got, expected in zip(names, grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0, msg=lambda m, n=name: n + m)


def test_the_preset_is_phi_3_small_with_32_heads():
    where = site(32, 8, dim=2)
    layer = make({"kind": "sharded_heads", "preset": "phi3_small"}, where)
    assert layer.mechanism.settings.model_dump(exclude={"kind", "preset"}) == {
        "block": 64, "local": 16, "stride": 8, "shard_by": "query_head"}  # fmt: skip
    shards = layer.mechanism.shards
    assert [shard.heads for shard in shards] == [
        (7, 15, 23, 31), (6, 14, 22, 30), (5, 13, 21, 29), (4, 12, 20, 28),
        (3, 11, 19, 27), (2, 10, 18, 26), (1, 9, 17, 25), (0, 8, 16, 24),
    ]  # fmt: skip
    assert [shard.groups for shard in shards] == [(1, 3, 5, 7)] * 4 + [(0, 2, 4, 6)] * 4


def test_one_head_has_its_keys_for_itself_only_where_heads_of_a_group_are_not_as_many():
    even = ShardedHeads(parsed(settings_of(4, 1, 2)), site(8, 2))
    odd = ShardedHeads(parsed(settings_of(4, 1, 2)), site(6, 2))
    kv = ShardedHeads(parsed(settings_of(4, 1, 2, "kv_head")), site(6, 2))
    assert [shard.groups for shard in even.shards] == [(0, 1), (0, 1)]
    assert [shard.groups for shard in odd.shards] == [(0, 1, 1), (0, 0, 1)]
    assert [shard.groups for shard in kv.shards] == [(1,), (0,)]


def parsed(settings):
    return AttentionSettings.model_validate({"mechanism": settings}).mechanism


@how(deadline=None, max_examples=200)
@drawn(st.integers(1, 64), st.integers(2, 32))
def test_heads_cover_every_block_if_they_are_as_many_as_the_stride(heads, stride):
    union = {kb for kb in range(stride) for h in range(heads)
             if sees(99 + stride, kb, h, heads, 1, stride)}  # fmt: skip
    assert len(union) == covered(heads, stride)
    assert (covered(heads, stride) == stride) == (heads >= stride)
    for head in range(heads):
        at = residue(head, heads, stride)
        assert [kb for kb in range(stride) if sees(999, kb, head, heads, 1, stride)] == [at]


@pytest.mark.parametrize(
    ("heads", "stride", "want"),
    [(32, 8, 64), (8, 8, 64), (16, 16, 64), (4, 8, 40), (6, 8, 52), (1, 8, 22)],
)
def test_coverage_of_64_blocks_is_that_of_the_published_formula(heads, stride, want):
    """With 16 local blocks; what few heads leave to nobody."""
    union = {kb for kb in range(64) for h in range(heads) if sees(63, kb, h, heads, 16, stride)}
    assert len(union) == want
    assert len(union) == 16 + (64 - 16) * covered(heads, stride) // stride


def test_the_rule_needs_no_torch():
    code = "import sys, longspan.attention.sharding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_tensor_ranks_count_heads_over_the_whole_layer_and_cover_every_block():
    """Each of four ranks has two of eight heads; their own numbers would leave most to nobody."""
    settings = settings_of(2, 1, 8)
    where = site(8, 4)
    layer, given = make(settings, where), inputs(CU[-1], where)
    out, (_, *grads) = run(layer, given, context(CU))
    parts, residues = [], []
    for rank in range(4):
        part = site(2, 1, first_head=2 * rank, all_heads=8)
        heads, group = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        share, mine = inputs(CU[-1], part), make(settings, part)
        share.q, share.k, share.v = given.q[:, heads], given.k[:, group], given.v[:, group]
        share.dout = given.dout[:, heads]
        got = run(mine, share, context(CU))
        parts.append([got[0], *got[1][1:]])
        residues += [shard.residue for shard in mine.mechanism.shards]
    for *pieces, expected in zip(*parts, [out, *grads], strict=True):
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-10, rtol=0)
    assert sorted(residues) == list(range(8)) and covered(2, 8) == 2


def test_kv_heads_are_counted_over_the_whole_layer_too():
    for rank in range(2):
        part = site(4, 2, first_head=4 * rank, all_heads=8)
        mechanism = ShardedHeads(parsed(settings_of(2, 1, 4, "kv_head")), part)
        found = {shard.residue: shard.heads for shard in mechanism.shards}
        numbers = [2 * rank, 2 * rank + 1]
        assert found == {
            residue(n, 4, 4): (2 * i, 2 * i + 1) for i, n in enumerate(numbers)
        }  # fmt: skip


def test_near_blocks_alone_are_dense_where_documents_are_short(monkeypatch):
    where, calls = site(), []
    given, ctx = inputs(CU[-1], where), context(CU)
    attend = ctx.cp.attend
    monkeypatch.setattr(ctx.cp, "attend", lambda *a, **k: calls.append(a) or attend(*a, **k))
    near = run(make(settings_of(8, 8, 2), where), given, ctx)
    dense = run(make({"kind": "dense"}, where), given, context(CU))
    assert len(calls) == 1
    for one, other in zip([near[0], *near[1]], [dense[0], *dense[1]], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    fewer = run(make(settings_of(8, 7, 2), where), given, context(CU))[0]
    assert not torch.allclose(fewer, dense[0])


@pytest.mark.parametrize("shard_by", ["query_head", "kv_head"])
def test_keys_of_other_shards_have_no_gradient(shard_by):
    where, settings = site(4, 2), settings_of(4, 2, 8, shard_by)
    layer, given = make(settings, where), inputs(CU[-1], where)
    given.dout[:-1] = 0
    seen_GS = mask(where, settings)[:, -1].view(2, 2, -1).any(1)
    for grad in run(layer, given, context(CU))[1][2:4]:
        assert torch.equal((grad != 0).any(-1), seen_GS.T)
    # 7 near keys and one or two far blocks for each head: two heads that see the same need no more.
    assert int(seen_GS.sum(1).max()) <= (15 if shard_by == "kv_head" else 23)


@pytest.mark.parametrize("shard_by", ["query_head", "kv_head"])
def test_a_changed_token_reaches_later_tokens_that_see_its_block_only(shard_by):
    where, settings = site(), settings_of(4, 2, 5, shard_by)
    layer, given = make(settings, where), inputs(CU[-1], where)
    before, seen_HTS = run(layer, given, context(CU))[0], mask(where, settings)
    for at in (0, 5, 11, 30, 69, 100, 148):
        other = inputs(CU[-1], where)
        for x in (other.hidden, other.q, other.k, other.v):
            x[at] += 1.0
        after = run(layer, other, context(CU))[0]
        assert torch.equal((before != after).any(-1), seen_HTS[:, :, at].T)


def test_the_last_rows_alone_are_those_of_the_whole():
    where = site()
    layer = make(settings_of(4, 2, 3), where, sinks=True)
    given = inputs(CU[-1], where)
    whole = run(layer, given, context(CU))[0]
    for rows in (torch.arange(148, 149), torch.arange(80, 149)):
        part = layer(given.hidden, given.q[rows], given.k, given.v, context(CU, rows))
        torch.testing.assert_close(part, whole[rows], atol=1e-12, rtol=0)


def test_documents_without_tokens_change_nothing():
    where = site()
    layer, given = make(settings_of(4, 2, 3), where), inputs(CU[-1], where)
    empty = sorted([*CU, 0, 11, 149])
    assert [b - a for a, b in pairwise(empty)].count(0) == 3
    want, got = (run(layer, given, context(cu)) for cu in (CU, empty))
    for one, other in zip([want[0], *want[1]], [got[0], *got[1]], strict=True):
        assert torch.equal(one, other)


def test_single_precision_is_as_good_as_one_softmax():
    where, settings = site(dtype=torch.float32), settings_of(4, 2, 3)
    layer = make(settings, where, sinks=True)
    given, seen = inputs(CU[-1], where, dtype=torch.float32), mask(where, settings)
    got = run(layer, given, context(CU))
    plain, exact = twin(layer, given, seen, torch.float32), twin(layer, given, seen)
    columns = zip(*([x[0], *x[1]] for x in (plain, got, exact)), strict=True)
    for naive, mine, want in columns:
        assert_as_good_as(naive, mine, want)


def test_the_probe_sees_what_queries_see():
    where, settings, probe = site(), settings_of(4, 2, 3), Probe(1, 1000, torch.device("cpu"))
    layer, given = make(settings, where), inputs(CU[-1], where)
    run(layer, given, context(CU, probe=probe))
    kept_HT = mask(where, settings).sum(-1) / (positions_of(CU) + 1)
    assert probe.table()[0]["kept"] == pytest.approx(float(kept_HT.mean()))


def test_64k_tokens_in_bounded_memory():
    tokens, where = 2**16, site(1, 1, dim=16, hidden=16, dtype=torch.float32)
    layer = make(settings_of(64, 16, 64), where)
    given = inputs(tokens, where, dtype=torch.float32)
    ctx = context([0, tokens - 1000, tokens])
    with peak_growth() as grown:
        run(layer, given, ctx)
    assert grown.mib < 512, grown.mib


def test_wrong_settings_are_refused():
    for wrong in ({"block": 0}, {"local": 0}, {"stride": 1}, {"shard_by": "layer"}):
        with pytest.raises(ValidationError):
            parsed({"kind": "sharded_heads", **wrong})
