"""Exchanges over random documents, owners and choices, against one rank."""

from itertools import pairwise, product
from random import Random

import pytest
import torch
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import Exchange, Local
from longspan.parallel.layout import Layout, make_layout
from longspan.parallel.simulation import simulate
from longspan.tests.parallel.ranks import EXCHANGES, KEEPING, SCALE, exchange_of, together
from support.grid import sample

HEADS, GROUPS, DIM, VALUE_DIM = 8, 2, 6, 4


def packing(random, kind, ranks):
    """Boundaries of documents."""
    if kind == "one":
        return [0, random.randrange(1, 120)]
    if kind == "many":
        return list(range(501))
    sizes = [random.choice([1, random.randrange(1, ranks + 1), random.randrange(1, 40)])
             for _ in range(random.randrange(1, 12))]  # fmt: skip
    return [sum(sizes[:n]) for n in range(len(sizes) + 1)]


def owned_at_random(random, length, ranks):
    """Pieces of any size with any owner; the last rank owns nothing."""
    cuts = sorted({0, length, *(random.randrange(length + 1) for _ in range(2 * ranks))})
    chunks = [[] for _ in range(ranks)]
    for chunk in pairwise(cuts):
        chunks[random.randrange(ranks - 1)].append(chunk)
    return Layout(length, tuple(map(tuple, chunks)))


def choices(random, cu, choosers, generator):
    """Blocks of 4 tokens that each row and block head chose of those of all documents."""
    if choosers is None:
        return None
    grid = Grid.documents(cu, 4)
    ids = torch.randint(-1, len(grid), (cu[-1], choosers, 6), generator=generator)
    return Blocks.choose(ids, grid)


def attend(exchange, index, given, reach, blocks):
    """A rank's output, lse and gradients, that of the sinks included."""
    *tensors, sink, dout, dlse = given
    q, k, v = (x[index].clone().requires_grad_() for x in tensors)
    sink = None if sink is None else sink.clone().requires_grad_()
    out, lse = exchange.attend(q, k, v, reach, blocks, scale=SCALE, sink_H=sink)
    # A row that sees nothing has no lse to learn from.
    learnt = torch.where(lse == float("-inf"), 0.0, lse)
    total = (out * dout[index]).sum() + (learnt * dlse[index]).sum()
    grads = torch.autograd.grad(total, (q, k, v) if sink is None else (q, k, v, sink))
    return [out.detach(), lse.detach(), *grads]


def assert_one_rank(
    name, ranks, layout_kind, packing_kind, window, choosers, seed,
    heads=HEADS, groups=GROUPS, dim=DIM, value_dim=VALUE_DIM,
):  # fmt: skip
    """Output, lse and gradients of all ranks are those of one."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    cu = packing(random, packing_kind, ranks)
    length = cu[-1]
    shapes = [(length, heads, dim), (length, groups, dim), (length, groups, value_dim), (heads,),
              (length, heads, value_dim), (length, heads)]  # fmt: skip
    given = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    if seed % 2:
        given[3] = None
    reach, blocks = Reach.documents(cu, window), choices(random, cu, choosers, generator)
    layout = (
        owned_at_random(random, length, ranks)
        if layout_kind == "random"
        else make_layout(layout_kind, length, ranks)
    )
    want = attend(Exchange(Local()), torch.arange(length), given, reach, blocks)

    def on_rank(transport):
        index = layout.index(transport.rank)
        own = None if blocks is None else Blocks(blocks.ids_QCN[index], blocks.grid)
        exchange = exchange_of(name, layout, transport)
        return attend(exchange, index, given, reach.rows(index), own)

    found = simulate(ranks, on_rank)
    whole = together(layout, [parts[:5] for parts in found])
    if given[3] is not None:
        whole.append(sum(parts[5] for parts in found))
    for got, wanted in zip(whole, want, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


GRID = list(
    product(
        ("zigzag", "contiguous", "striped", "random"),
        ("random", "one", "many"),
        (None, 7),
        (None, 1, GROUPS, HEADS),
    )
)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", [*EXCHANGES, *KEEPING])
def test_any_documents_of_any_owners_are_those_of_one_rank_in_fp64(name, ranks):
    cases = [(*case, seed) for seed, case in enumerate(GRID)]
    for case in sample(f"{name} {ranks}", cases, 8):
        assert_one_rank(name, ranks, *case)


@pytest.mark.parametrize("heads", [(4, 4), (6, 3)])
@pytest.mark.parametrize("name", EXCHANGES)
def test_latent_attention_and_uneven_heads(name, heads):
    """Keys of 192 and values of 128 numbers (MLA), and heads that ranks cannot share evenly."""
    heads, groups = heads
    shape = {"heads": heads, "groups": groups, "dim": 192, "value_dim": 128}
    for choosers in (None, groups, heads):
        assert_one_rank(name, 4, "zigzag", "random", None, choosers, 1, **shape)


@pytest.mark.parametrize("name", EXCHANGES)
def test_one_token_is_enough_for_all_ranks(name):
    for length in (1, 3):
        layout = make_layout("zigzag", length, 4)
        given = [torch.ones(length, *shape, dtype=torch.float64)
                 for shape in ((HEADS, DIM), (GROUPS, DIM), (GROUPS, VALUE_DIM))]  # fmt: skip

        def on_rank(transport, layout=layout, given=given, length=length):
            index = layout.index(transport.rank)
            reach = Reach.documents([0, length]).rows(index)
            exchange = exchange_of(name, layout, transport)
            return exchange.attend(*(x[index] for x in given), reach, scale=SCALE)[0]

        found = torch.cat(simulate(4, on_rank))
        torch.testing.assert_close(found, torch.ones(length, HEADS, VALUE_DIM).double())
