"""What is made of windows by their owners, and some heads of some tokens, against one rank."""

from itertools import product
from random import Random

import pytest
import torch
from longspan.attention.pooling import pool_keys
from longspan.kernels.mirror import Mirror
from longspan.kernels.windows import Windows
from longspan.parallel.entries import Entries
from longspan.parallel.exchange import Exchange, make_exchange
from longspan.parallel.gathering import Gathering
from longspan.parallel.halo import Halo
from longspan.parallel.layout import make_layout
from longspan.parallel.method import Local
from longspan.parallel.simulation import simulate
from longspan.parallel.traffic import CountedTransport, Traffic
from longspan.parallel.volume import Volume
from longspan.tests.parallel.ranks import DOCUMENTS, LENGTH, gloo_pooled, pooled_on_rank
from longspan.tests.parallel.test_packings import owned_at_random, packing
from support.grid import sample

SIZES = [(32, 16), (4, 1), (8, 8), (5, 3)]
LAYOUTS = ["zigzag", "contiguous", "striped", "random"]
CASES = list(product(LAYOUTS, ("random", "one", "many"), SIZES, (False, True)))
WIRE = {torch.bfloat16: (2, 4), torch.float32: (4, 4), torch.float64: (8, 8)}


def drawn(case, ranks, seed):
    """A layout and windows, from a case of the grid."""
    layout_kind, packing_kind, size, tail = case
    random = Random(seed)
    cu = packing(random, packing_kind, ranks)
    if layout_kind == "random":
        layout = owned_at_random(random, cu[-1], ranks)
    else:
        layout = make_layout(layout_kind, cu[-1], ranks)
    return layout, Windows.documents(cu, *size, tail=tail)


def fresh(windows):
    """The same windows, of which nothing is known yet: those of another rank."""
    how = windows.length, windows.stride, windows.keys
    return Windows(windows.starts_P, windows.stops_P, *how)


def numbered(key, count):
    """Some cases of the grid, with the seeds that they always have."""
    return sample(f"halo {key}", enumerate(CASES), count)


def check_pooled(layout, windows, seed):
    """Weighted sums of windows and their gradients, from other gradients on each rank."""
    generator, ranks = torch.Generator().manual_seed(seed), layout.ranks
    shapes = [(layout.length, 2, 3), (2, windows.length), (ranks, len(windows), 2, 3)]
    x, weight, dout = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    x.requires_grad_(), weight.requires_grad_()
    want = pool_keys(x, windows, "weighted", weight)
    dx, dweight = torch.autograd.grad(want, (x, weight), dout.sum(0))

    def on_rank(transport):
        exchange = make_exchange("ring", layout, transport)
        own = x[layout.index(transport.rank)].detach().requires_grad_()
        mine = weight.detach().requires_grad_()
        made = []

        def make(k, some):
            made.append(len(some))
            return pool_keys(k, some, "weighted", mine)

        got = exchange.pooled(own, fresh(windows), make)
        return sum(made), got.detach(), *torch.autograd.grad(got, (own, mine), dout[transport.rank])

    made, outs, dxs, dweights = zip(*simulate(ranks, on_rank), strict=True)
    assert sum(made) == len(windows)
    order = torch.cat([layout.index(rank) for rank in range(ranks)]).argsort()
    for got in outs:
        assert torch.equal(got, want)
    torch.testing.assert_close(torch.cat(dxs)[order], dx, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sum(dweights), dweight, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_windows_of_any_documents_and_owners_are_those_of_one_rank_in_fp64(ranks):
    for seed, case in numbered(ranks, 12):
        check_pooled(*drawn(case, ranks, seed), seed)


def check_means(layout, windows, dtype, seed):
    x = torch.randn(layout.length, 2, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for how in ("mean", "max", "min"):
        want = pool_keys(x, windows, how)
        for got in simulate(layout.ranks, pooled_on_rank(layout, x, windows, how)):
            assert torch.equal(got, want), how


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [3, 8])
def test_means_and_extremes_are_those_of_one_rank_to_the_last_bit(ranks, dtype):
    for seed, case in numbered(f"means {ranks} {dtype}", 8):
        check_means(*drawn(case, ranks, seed), dtype, seed)


def test_a_gradient_that_went_home_is_as_good_as_that_of_one_rank():
    windows = Windows.documents([0, 500], 32, 16)
    x, dout = (torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (500, 30))

    def gradient(ranks, dtype):
        layout = make_layout("striped", 500, ranks)

        def on_rank(transport):
            index = layout.index(transport.rank)
            own = x[index].bfloat16().to(dtype).requires_grad_()
            exchange = make_exchange("ring", layout, transport)
            make = lambda k, some: pool_keys(k, some, "mean")  # noqa: E731
            got = exchange.pooled(own, fresh(windows), make)
            # One rank has all of the gradient of windows.
            mine = dout.bfloat16() * (transport.rank == 0)
            return torch.autograd.grad(got, own, mine.to(dtype))[0].double()

        order = torch.cat([layout.index(rank) for rank in range(ranks)]).argsort()
        return torch.cat(simulate(ranks, on_rank))[order]

    want = gradient(1, torch.float64)
    errors = [float((gradient(n, torch.bfloat16) - want).norm()) for n in (1, 2, 4, 8, 16, 32)]
    assert max(errors) <= 1.3 * errors[0] <= 0.01 * float(want.norm())


def test_a_plan_is_made_once_for_all_layers(monkeypatch):
    layout, made, plan = make_layout("zigzag", LENGTH, 2), [], Halo.of
    monkeypatch.setattr(Halo, "of", lambda *args: made.append(args) or plan(*args))

    def on_rank(transport):
        exchange, windows = (
            make_exchange("ring", layout, transport),
            Windows.documents([0, 96], 4, 2),
        )
        x = torch.ones(len(layout.index(transport.rank)), 1, 1)
        for _ in range(3):
            exchange.pooled(x, windows, lambda k, some: pool_keys(k, some, "mean"))

    simulate(2, on_rank)
    assert len(made) == 2


def test_one_rank_pools_where_it_is():
    windows, x, given = Windows.documents(DOCUMENTS, 4, 2), torch.randn(LENGTH, 2, 3), []
    Exchange(Local()).pooled(x, windows, lambda *args: given.append(args) or x)
    assert given[0][0] is x and given[0][1] is windows


def wanted(random, tokens, groups):
    """Numbers of entries, some of them twice, and often few of them."""
    most = max(1, random.choice([1, 7, 2 * tokens * groups]))
    return torch.tensor([random.randrange(tokens * groups) for _ in range(random.randrange(most))],
                        dtype=torch.int64)  # fmt: skip


def check_entries(layout, index_N, seed=0):
    generator, ranks = torch.Generator().manual_seed(seed), layout.ranks
    shapes = [(layout.length, 2, 3), (ranks, len(index_N), 3)]
    x, dout = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    x.requires_grad_()
    want = Exchange(Local()).gather_some(x, Mirror(index_N))
    (dx,) = torch.autograd.grad(want, x, dout.sum(0))

    def on_rank(transport):
        own = x[layout.index(transport.rank)].detach().requires_grad_()
        got = make_exchange("ring", layout, transport).gather_some(own, Mirror(index_N))
        return got.detach(), *torch.autograd.grad(got, own, dout[transport.rank])

    outs, dxs = zip(*simulate(ranks, on_rank), strict=True)
    order = torch.cat([layout.index(rank) for rank in range(ranks)]).argsort()
    for got in outs:
        assert torch.equal(got, want)
    torch.testing.assert_close(torch.cat(dxs)[order], dx, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_wanted_entries_of_any_owners_are_those_of_one_rank_in_fp64(ranks):
    for seed, (kind, packing_kind) in enumerate(product(LAYOUTS, ("random", "one"))):
        layout, _ = drawn((kind, packing_kind, (8, 8), True), ranks, seed)
        check_entries(layout, wanted(Random(seed), layout.length, 2), seed)


def counted(ranks, body):
    """What each rank sends: `body(transport)` runs forward, its first result then backward."""

    def on_rank(transport):
        traffic = Traffic()
        out, want = body(CountedTransport(transport, traffic))
        forward = traffic.take()
        out.float().sum().backward()
        return Volume(forward, traffic.take()), want

    return simulate(ranks, on_rank)


@pytest.mark.parametrize("dtype", WIRE)
@pytest.mark.parametrize("layout_kind", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_pooling_sends_halos_and_windows(ranks, layout_kind, dtype):
    layout = make_layout(layout_kind, LENGTH, ranks)

    def body(transport):
        windows = Windows.documents(DOCUMENTS, 6, 2)
        x = torch.ones(len(layout.index(transport.rank)), 2, 6, dtype=dtype, requires_grad=True)
        exchange = make_exchange("ring", layout, transport)
        make = lambda k, some: pool_keys(k, some, "mean")[..., :4]  # noqa: E731
        halo = Halo.of(windows, Gathering(layout, transport))
        return exchange.pooled(x, windows, make), halo.volume(12, 8, *WIRE[dtype], learns=True)

    for got, want in counted(ranks, body):
        assert got == want


def test_a_window_that_straddles_an_edge_costs_what_lies_behind_it():
    # Chunks of 24 tokens; the window at 22 ends with token 27. 46 windows, 12 of a rank at most.
    layout, (wire, accumulator) = make_layout("contiguous", 96, 4), WIRE[torch.bfloat16]

    def body(transport):
        x = torch.ones(24, 2, 6, dtype=torch.bfloat16, requires_grad=True)
        windows = Windows.documents([0, 96], 6, 2)
        make = lambda k, some: pool_keys(k, some, "mean")  # noqa: E731
        return make_exchange("fetch", layout, transport).pooled(x, windows, make), None

    for rank, (got, _) in enumerate(counted(4, body)):
        made, halo = 3 * 12 * 12, 4 * 12
        sent, came = halo * (rank > 0), halo * (rank < 3)
        assert got == (made * wire + sent * wire, made * accumulator + came * wire)


def test_blocks_that_no_edge_cuts_have_no_halo():
    layout = make_layout("contiguous", 96, 4)

    def halo(transport):
        return Halo.of(Windows.documents([0, 96], 8, 8), Gathering(layout, transport))

    assert not any(plan.travels for plan in simulate(4, halo))


@pytest.mark.parametrize("dtype", WIRE)
@pytest.mark.parametrize("layout_kind", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_wanted_entries_travel_once_and_alone(ranks, layout_kind, dtype):
    layout = make_layout(layout_kind, LENGTH, ranks)
    # Each head every fourth block of 4 tokens, and all of that twice.
    at = torch.arange(LENGTH)
    index_N = torch.cat([at[at // 4 % 4 == 2 * head] * 2 + head for head in (0, 1)]).repeat(2)

    def body(transport):
        x = torch.ones(len(layout.index(transport.rank)), 2, 6, dtype=dtype, requires_grad=True)
        exchange, mirror = make_exchange("ring", layout, transport), Mirror(index_N)
        entries = Entries(index_N, 2, Gathering(layout, transport))
        most = max(int((layout.index(rank) // 4 % 2 == 0).sum()) for rank in range(ranks))
        assert entries.layout.largest == most <= -(-LENGTH // ranks)
        return exchange.gather_some(x, mirror), entries.volume(6, *WIRE[dtype], learns=True)

    for got, want in counted(ranks, body):
        assert got == want


def test_real_gloo_ranks(worlds):
    x = torch.randn(LENGTH, 2, 3, generator=torch.Generator().manual_seed(0))
    windows, index_N = Windows.documents(DOCUMENTS, 6, 2), torch.tensor([191, 0, 77, 0, 100])
    x.requires_grad_()
    want = pool_keys(x, windows, "mean"), x.flatten(0, 1)[index_N]
    (dx,) = torch.autograd.grad([out * 2 for out in want], x, [torch.ones_like(o) for o in want])
    for outs, (grad, index) in worlds(2).run(gloo_pooled, x.detach(), index_N):
        for got, wanted_ in zip(outs, want, strict=True):
            assert torch.equal(got, wanted_)
        torch.testing.assert_close(grad, dx[index], atol=1e-6, rtol=1e-6)
