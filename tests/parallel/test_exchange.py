import gc
import weakref

import pytest
import torch
from longspan.kernels import reach as reach_module
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
from longspan.tests.parallel.ranks import (
    DOCUMENTS,
    EXCHANGES,
    LENGTH,
    SCALE,
    attend_on_rank,
    exchange_of,
    gloo_attend,
    together,
    whole_tensors,
)
from reference.attention import naive_attend, naive_gradients
from reference.visibility import visible_in

LAYOUTS = ["zigzag", "contiguous", "striped"]
NAMES = ["out", "dq", "dk", "dv"]


def on_ranks(ranks, kind, layout_kind, reach, tensors):
    """Output, dq, dk, dv of the whole sequence, computed by `ranks` simulated ranks."""
    layout = make_layout(layout_kind, len(reach), ranks)
    results = simulate(ranks, lambda t: attend_on_rank(t, kind, layout, reach, tensors))
    return together(layout, results)


def naive(reach, tensors):
    q, k, v, dout = tensors
    bounds = (visible_in(reach.first_T, reach.last_T, len(k)), SCALE)
    return naive_attend(q, k, v, *bounds)[0], *naive_gradients(dout, q, k, v, *bounds)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("cu", [DOCUMENTS, [0, LENGTH], [0, 13, LENGTH]])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_is_exact_in_fp64(ranks, kind, layout, cu, window):
    reach, tensors = Reach.documents(cu, window), whole_tensors()
    got = on_ranks(ranks, kind, layout, reach, tensors)
    for name, result, want in zip(NAMES, got, naive(reach, tensors), strict=True):
        torch.testing.assert_close(result, want, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1.5), (torch.bfloat16, 1.02)])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_the_error_does_not_grow_with_ranks(kind, dtype, slack):
    reach, tensors = Reach.documents([0, 100, 512]), whole_tensors(dtype, 512)
    wants, alone = naive(reach, tensors), None
    # Heads are the limit of Ulysses; two dimensions go on.
    for ranks in (1, 2, 4, 8) if kind == "ulysses" else (1, 2, 4, 8, 16, 32):
        got = on_ranks(ranks, kind, "zigzag", reach, tensors)
        assert {x.dtype for x in got} == {dtype}
        pairs = zip(got, wants, strict=True)
        errors = [float((result.double() - want).norm() / want.norm()) for result, want in pairs]
        alone = alone or errors
        # Partial outputs rounded to bf16 before they are merged would already cost 5%.
        for name, error, single in zip(NAMES, errors, alone, strict=True):
            assert error <= slack * single <= slack * torch.finfo(dtype).eps * 8, (ranks, name)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_real_gloo_ranks(worlds, kind, layout, window):
    # Two ranks have no second node.
    ranks = 4 if EXCHANGES[kind] else 2
    results = worlds(ranks).run(gloo_attend, kind, layout, window)
    got = together(make_layout(layout, LENGTH, ranks), results)
    reach, tensors = Reach.documents(DOCUMENTS, window), whole_tensors(torch.float32)
    for name, result, want in zip(NAMES, got, naive(reach, tensors), strict=True):
        torch.testing.assert_close(result.double(), want, atol=1e-5, rtol=1e-5, msg=name)


def test_gradcheck():
    reach = Reach.documents([0, 5, 12])
    exchange = make_exchange("ring", make_layout("zigzag", 12, 1))
    q, k, v, _ = (x[:12].requires_grad_() for x in whole_tensors())
    assert torch.autograd.gradcheck(
        lambda *xs: exchange.attend(*xs, reach, scale=SCALE)[0], (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("kind", ["ring", "double_ring", "all_gather", "fetch"])
def test_keys_that_a_rank_does_not_need_never_touch_it(kind):
    # Two documents of two ranks each: later ranks, and the other document's, are not needed.
    reach, layout = Reach.documents([0, 48, 96]), make_layout("contiguous", 96, 4)
    clean = on_ranks(4, kind, "contiguous", reach, whole_tensors())
    for poisoned, untouched in [(1, (0, 2, 3)), (3, (0, 1, 2)), (0, (2, 3)), (2, (0, 1))]:
        tensors = whole_tensors()
        for x in tensors[1:3]:
            x[layout.index(poisoned)] = float("nan")
        got = on_ranks(4, kind, "contiguous", reach, tensors)
        for rank in untouched:
            rows = layout.index(rank)
            for result, want in zip(got[:2], clean[:2], strict=True):
                torch.testing.assert_close(result[rows], want[rows])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("layout_kind", LAYOUTS)
def test_fetch_brings_no_key_that_no_query_of_the_rank_sees(layout_kind, window):
    reach, layout = Reach.documents(DOCUMENTS, window), make_layout(layout_kind, LENGTH, 4)
    clean = on_ranks(4, "fetch", layout_kind, reach, whole_tensors())
    for rank in range(4):
        rows = layout.index(rank)
        seen = visible_in(reach.first_T[rows], reach.last_T[rows], LENGTH).any(1)[0]
        seen[rows] = True
        assert not seen.all()
        tensors = whole_tensors()
        for x in tensors[1:3]:
            x[~seen] = float("nan")
        got = on_ranks(4, "fetch", layout_kind, reach, tensors)
        for result, want in zip(got[:2], clean[:2], strict=True):
            torch.testing.assert_close(result[rows], want[rows])


@pytest.mark.parametrize("kind", EXCHANGES)
def test_heads_never_touch_each_other(kind):
    reach = Reach.documents(DOCUMENTS)
    clean, tensors = on_ranks(4, kind, "zigzag", reach, whole_tensors()), whole_tensors()
    for x in tensors[1:3]:
        x[:, 1] = float("nan")
    got = on_ranks(4, kind, "zigzag", reach, tensors)
    for result, want, first in zip(got, clean, (4, 4, 1, 1), strict=True):
        torch.testing.assert_close(result[:, :first], want[:, :first])


@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize("token", [20, 33, 49, 50])
def test_a_token_reaches_later_tokens_of_its_document_only(kind, token):
    reach, tensors = Reach.documents(DOCUMENTS), whole_tensors()
    before = on_ranks(4, kind, "zigzag", reach, tensors)[0]
    for x in tensors[1:3]:
        x[token] += 1.0
    after = on_ranks(4, kind, "zigzag", reach, tensors)[0]
    changed = ((before - after).abs() > 1e-9).flatten(1).any(dim=1).nonzero()[:, 0]
    end = next(stop for stop in DOCUMENTS if stop > token)
    assert changed.tolist() == list(range(token, end))


@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_backward_needs_no_more_than_the_tensors_of_a_rank(kind):
    reach, layout = Reach.documents(DOCUMENTS), make_layout("zigzag", 96, 4)

    def kept_on_rank(transport):
        kept = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        with keep:
            attend_on_rank(transport, kind, layout, reach, whole_tensors())
        return [x.numel() for x in kept]

    # Four ranks have more heads than there are keys' heads, of which two ranks have each one.
    copies = 2 if kind == "ulysses" else 1
    of_rank = [24 * 8 * 6, copies * 24 * 2 * 6, copies * 24 * 2 * 4, 24 * 8 * 4, 24 * 8]
    assert simulate(4, kept_on_rank) == [of_rank] * 4


@pytest.mark.parametrize("kind", EXCHANGES)
def test_layers_share_one_plan(kind, monkeypatch):
    layout, tensors, calls = make_layout("zigzag", 96, 4), whole_tensors(), []
    for owner, name in [(reach_module, "plan_pieces"), (Reach, "keys")]:
        plan = getattr(owner, name)
        counted = lambda *args, plan=plan: calls.append(plan) or plan(*args)  # noqa: E731
        monkeypatch.setattr(owner, name, counted)

    def plans(layers):
        def body(transport):
            index = layout.index(transport.rank)
            exchange = exchange_of(kind, layout, transport)
            reach = Reach.documents(DOCUMENTS).rows(index)
            for _ in range(layers):
                exchange.attend(*(x[index] for x in tensors[:3]), reach, scale=SCALE)

        calls.clear()
        simulate(4, body)
        return len(calls)

    assert plans(3) == plans(1) > 0


def test_one_rank_needs_no_transport():
    reach, tensors = Reach.documents(DOCUMENTS), whole_tensors()
    for kind in EXCHANGES:
        layout = make_layout("zigzag", LENGTH, 1)
        got = attend_on_rank(None, kind, layout, reach, tensors)
        for result, want in zip(got, naive(reach, tensors), strict=True):
            torch.testing.assert_close(result, want, atol=1e-10, rtol=1e-10)


def test_no_graph_no_memory():
    exchange = make_exchange("ring", make_layout("zigzag", LENGTH, 1))
    q, k, v, _ = (x.requires_grad_() for x in whole_tensors())
    with torch.no_grad():
        out = exchange.attend(q, k, v, Reach.documents(DOCUMENTS), scale=SCALE)[0]
    assert out.grad_fn is None


@pytest.mark.parametrize("choosers", [None, 1, 2])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_nothing_keeps_a_reach_or_its_choices_that_are_gone(kind, choosers):
    layout, (q, k, v, _) = make_layout("zigzag", LENGTH, 4), whole_tensors()

    def alive(transport):
        exchange, index = exchange_of(kind, layout, transport), layout.index(transport.rank)
        every, blocks = Reach.documents(DOCUMENTS), None
        reach = every.rows(index)
        if choosers:
            ids = torch.zeros(len(index), choosers, 2, dtype=torch.int32)
            blocks = Blocks(ids, Grid.documents(DOCUMENTS, 8))
        leaves = [x[index].requires_grad_() for x in (q, k, v)]
        out = exchange.attend(*leaves, reach, blocks, scale=SCALE)[0]
        torch.autograd.grad(out.sum(), leaves)
        known = [weakref.ref(x) for x in (every, reach, blocks) if x is not None]
        del every, reach, blocks, out
        return sum(x() is not None for x in known)

    gc.disable()  # which would find circles
    try:
        assert simulate(4, alive) == [0] * 4
    finally:
        gc.enable()
