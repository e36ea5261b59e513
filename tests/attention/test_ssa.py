import pytest
import torch
from reference.ssa import naive_blocks, naive_streams
from support.grid import sample
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
from torch.nn.functional import smooth_l1_loss

CU = [0, 1, 4, 9, 40, 77]
SSA = {"kind": "ssa", "block": 4, "count": 3, "align": 10.0, "beta": 0.3}
SCALE = 8**-0.5


def twin(layer, given, cu, sparse, weights, settings=SSA):
    """Output, gradients of everything and the alignment's sum, by automatic differentiation."""
    leaves = given.leaves()
    hidden, q, k, v = leaves
    gate = layer.mechanism.gate
    q, k = (turned(x, positions_of(cu)) for x in (q, k))
    how = cu, settings["block"], settings["count"], q.shape[-1] ** -0.5
    full, thin = naive_streams(hidden, q, k, v, gate, *how)
    main, other = (thin, full) if sparse else (full, thin)

    def distance(a, b):
        each = smooth_l1_loss(a, b, beta=settings["beta"], reduction="none")
        return (each.flatten(1).mean(1) * weights).sum()

    align = distance(main, other.detach()) + distance(main.detach(), other)
    loss = (main * given.dout).sum() + settings["align"] / 2 * align  # the site has two layers
    return main.detach(), gradients(loss, None, [*leaves, gate]), float(align.detach())


def draw(number):
    return lambda name: {"ssa": number}[name]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("cu", [CU, [0, 61]])
def test_outputs_and_gradients_equal_the_twin(cu, heads, groups, sparse):
    where = site(heads, groups)
    layer, given = make(SSA, where), inputs(cu[-1], where)
    weights = torch.rand(cu[-1], generator=torch.Generator().manual_seed(3)).double()
    ctx = context(cu, weights_T=weights, draw=draw(0.1 if sparse else 0.9))
    out, grads = run(layer, given, ctx)
    want, want_grads, align = twin(layer, given, cu, sparse, weights)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    for name, got, expected in zip(["hidden", *"qkv", "gate"], grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0, msg=lambda m, n=name: n + m)
    total, weight = ctx.notes.sums["alignment"]
    assert abs(float(total) - align) < 1e-9 and float(weight) == pytest.approx(float(weights.sum()))


def test_the_sparse_stream_with_all_blocks_is_the_dense_one():
    where = site()
    given = inputs(77, where)
    layer = make({**SSA, "count": 40, "align": 0}, where)
    full, sparse = (run(layer, given, context(CU, draw=draw(x))) for x in (0.9, 0.1))
    for one, other in zip([full[0], *full[1]], [sparse[0], *sparse[1]], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_keys_outside_the_selection_learn_through_the_alignment_only():
    """Of the last query's gradient, in the sparse stream."""
    where, cu = site(2, 1), [0, 61]
    given = inputs(61, where)
    given.dout[:-1] = 0
    rows = torch.zeros(61)
    rows[-1] = 1
    k = turned(given.k, positions_of(cu))
    q = turned(given.q, positions_of(cu))
    chosen = naive_blocks(q, k, cu, SSA["block"], SSA["count"], SCALE)[0, -1]
    assert 0 < int(chosen.sum()) < 61
    for align in (0.0, 10.0):
        layer = make({**SSA, "align": align}, where)
        ctx = context(cu, weights_T=rows, draw=draw(0.1))
        dk, dv = run(layer, given, ctx)[1][2:4]
        for grad in (dk, dv):
            assert bool((grad[~chosen] != 0).any()) == bool(align)
            assert bool((grad[chosen] != 0).any())


def test_evaluation_sees_the_stream_and_the_budget_that_the_settings_say():
    where = site()
    given = inputs(77, where)
    streams = []
    for changes in ({}, {"evaluate": "full"}, {"evaluate_count": 40}, {"evaluate_count": 1}):
        layer = make(SSA | changes, where)
        ctx = context(CU, training=False, learns=False)
        streams.append(run(layer, given, ctx)[0])
        assert not ctx.notes.sums
    sparse, full, all_blocks, own = streams
    training = run(make(SSA, where), given, context(CU, draw=draw(0.1)))[0]
    torch.testing.assert_close(sparse, training, atol=0, rtol=0)
    torch.testing.assert_close(full, all_blocks, atol=1e-12, rtol=0)
    assert not torch.allclose(sparse, full) and not torch.allclose(own, sparse)


@pytest.mark.parametrize("sparse", [0.1, 0.9])
def test_a_changed_token_reaches_later_tokens_of_its_document_only(sparse):
    where = site()
    layer, given = make(SSA, where), inputs(77, where)
    before = run(layer, given, context(CU, draw=draw(sparse)))[0]
    for at in (0, 8, 9, 30):
        other = inputs(77, where)
        for x in (other.hidden, other.q, other.k, other.v):
            x[at] += 1.0
        after = run(layer, other, context(CU, draw=draw(sparse)))[0]
        end = next(stop for stop in CU[1:] if stop > at)
        same = torch.ones(77, dtype=torch.bool)
        same[at:end] = False
        assert torch.equal(before[same], after[same])
        assert not torch.equal(before[at], after[at])


def test_the_last_rows_alone_are_those_of_the_whole():
    where = site()
    layer, given = make(SSA, where), inputs(61, where)
    whole = run(layer, given, context([0, 61], training=False))[0]
    rows = torch.arange(50, 61)
    ctx = context([0, 61], rows, training=False)
    part = layer(given.hidden, given.q[rows], given.k, given.v, ctx)
    torch.testing.assert_close(part, whole[rows], atol=1e-12, rtol=0)


def test_tensor_ranks_together_are_one():
    """Each has half of the heads; the parts of the alignment add up."""
    where = site(4, 2)
    layer, given = make(SSA, where), inputs(77, where)
    ctx = context(CU, draw=draw(0.1))
    out, (dhidden, dq, dk, dv, dgate) = run(layer, given, ctx)
    parts, totals = [], []
    for rank, (half, share) in enumerate(halves(where, given)):
        mine = make(SSA, half)
        with torch.no_grad():
            mine.mechanism.gate.copy_(layer.mechanism.gate.chunk(2)[rank])
        here = context(CU, draw=draw(0.1))
        parts.append(run(mine, share, here))
        totals.append(here.notes.sums["alignment"][0])
        assert here.notes.parts == {"alignment"}
    together = [torch.cat([one[1][i], other[1][i]], 1) for one, other in [parts] for i in (1, 2, 3)]
    want = [out, dhidden, dq, dk, dv, dgate, ctx.notes.sums["alignment"][0]]
    found = [
        torch.cat([part[0] for part in parts], 1),
        parts[0][1][0] + parts[1][1][0],
        *together,
        torch.cat([part[1][4] for part in parts]),
        sum(totals),
    ]
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("sparse", sample("64K tokens", [0.1, 0.9], 1))
def test_64k_tokens_in_bounded_memory(sparse):
    tokens, where = 2**16, site(1, 1, dim=16, hidden=16, dtype=torch.float32)
    layer = make({"kind": "ssa", "block": 64, "count": 16}, where)
    given = inputs(tokens, where, dtype=torch.float32)
    ctx = context([0, tokens], draw=draw(sparse))
    with peak_growth() as grown:
        run(layer, given, ctx)
    assert grown.mib < 512, grown.mib
