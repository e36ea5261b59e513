"""Every mechanism over simulated context ranks: outputs, gradients, losses and choices of one."""

import os
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import pytest
import torch
from longspan.attention.documents import Documents
from longspan.attention.notes import Notes
from longspan.attention.probe import MEASURES, Probe
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
from longspan.tests.parallel.ranks import EXCHANGES, exchange_of
from support.mechanism_cases import MECHANISMS, SEER
from support.mechanisms import (
    Inputs,
    assert_all_close,
    context,
    inputs,
    make,
    positions_of,
    run,
    site,
)

TOKENS = 96
PACKINGS = {"packed": [0, 1, 20, 25, 90, 96], "one": [0, 96], "many": list(range(0, 97, 3))}
CASES = {
    name: stage
    for name, stage in MECHANISMS.items()
    if name != "mixed"  # layers of others
} | {
    "seer": {"mechanism": SEER["token"]},
    "infllm_v2_dense": {
        "mechanism": {**MECHANISMS["infllm_v2"]["mechanism"], "dense_below": 10_000}
    },
}


def learned(layer):
    """What losses of their own added to the parameters."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]


@dataclass
class Passes:
    """Choices of a pass without gradients; the rest of one with them."""

    rows: list  # output, gradients of hidden, q, k, v
    summed: list  # gradients of parameters, by the output and by losses of their own
    notes: dict
    chosen: dict
    measured: torch.Tensor

    def means(self):
        """What the probe measured; the mean of the alignment is over a rank's own weights."""
        at = [n for n, measure in enumerate(MEASURES) if measure != "alignment"]
        return self.measured[0, at, 0] / self.measured[0, at, 1].clamp(min=1)


def passes(layer, given, fresh):
    """Two passes of a layer."""
    kept, notes = {}, Notes()
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, fresh(kept=kept))
    layer.zero_grad(set_to_none=True)
    probe = Probe(1, TOKENS, torch.device("cpu"))
    out, grads = run(layer, given, fresh(notes=notes, probe=probe))
    chosen = {name: blocks.ids_QCN for name, blocks in kept.items()}
    return Passes([out, *grads[:4]], [*grads[4:], *learned(layer)], notes.sums, chosen, probe.sums)


def of_rank(transport, given, cu, weights, kind, layout):
    """The inputs of one context rank, and what makes contexts for them."""
    index = layout.index(transport.rank)
    positions = positions_of(cu)[index]

    def fresh(**changes):
        return replace(
            context(cu, weights_T=weights[index], **changes),
            cp=exchange_of(kind, layout, transport),
            documents=Documents(cu, index),
            positions_T=positions,
            positions_S=positions,
        )

    return Inputs(*(x[index] for x in vars(given).values())), fresh


def a_layer(name):
    """A case's layer, inputs and loss weights."""
    stage, where = dict(CASES[name]), site()
    layer = make(stage.pop("mechanism", {"kind": "dense"}), where, **stage)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)).double()
    return layer, inputs(TOKENS, where), weights


def one_and_many(name, ranks, kind, layout_kind, cu):
    """By name what one rank computes, and what context ranks do together."""
    layer, given, weights = a_layer(name)
    want = passes(layer, given, lambda **how: context(cu, weights_T=weights, **how))
    layout = make_layout(layout_kind, TOKENS, ranks)

    def on_rank(transport):
        return passes(deepcopy(layer), *of_rank(transport, given, cu, weights, kind, layout))

    found = simulate(ranks, on_rank)
    index = torch.cat([layout.index(rank) for rank in range(ranks)])
    together = Passes(
        [torch.cat(parts)[index.argsort()] for parts in zip(*(x.rows for x in found), strict=True)],
        [sum(parts) for parts in zip(*(x.summed for x in found), strict=True)],
        {label: sum(x.notes[label] for x in found) for label in want.notes},
        {
            label: torch.cat([x.chosen[label] for x in found])[index.argsort()]
            for label in want.chosen
        },
        sum(x.measured for x in found),
    )
    return want, together


def sampled(name, ranks):
    """Some of the grid, others for each case; all of it where the environment asks."""
    layouts = "zigzag", "contiguous", "striped"
    # There are 4 query heads.
    exchanges = [exchange for exchange in EXCHANGES if ranks <= 4 or exchange != "ulysses"]
    grid = list(product(exchanges, layouts, PACKINGS.values()))
    if os.environ.get("LONGSPAN_TEST_GRID") == "full":
        return grid
    Random(f"{name} {ranks}").shuffle(grid)
    return grid[:4]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_context_ranks_are_one_rank_in_fp64(name, ranks):
    for kind, layout_kind, cu in sampled(name, ranks):
        one, many = one_and_many(name, ranks, kind, layout_kind, cu)
        assert_all_close(many.rows, one.rows, atol=1e-10)
        for got, want in zip(many.summed, one.summed, strict=True):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        for label, want in one.notes.items():
            torch.testing.assert_close(many.notes[label], want, atol=1e-10, rtol=1e-10)
        for label, ids in one.chosen.items():
            assert torch.equal(many.chosen[label], ids), label
        torch.testing.assert_close(many.means(), one.means(), atol=1e-10, rtol=0)


class Recording:
    """An exchange that remembers the reaches over keys that live where their tokens do."""

    def __init__(self, exchange):
        self.exchange, self.gather, self.reaches = exchange, exchange.gather, []

    def attend(self, q, k, v, reach, blocks=None, *, here=False, **how):
        if not here:
            self.reaches.append(reach)
        return self.exchange.attend(q, k, v, reach, blocks, here=here, **how)


def handed(layer, given, ctx):
    """The reaches that a layer hands to its exchange, training and in an evaluation."""
    reaches = []
    for training in (True, False):
        recording = Recording(ctx.cp)
        now = replace(ctx, cp=recording, training=training, learns=training)
        layer(given.hidden, given.q, given.k, given.v, now)
        reaches += recording.reaches
    return reaches


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cu", PACKINGS.values(), ids=PACKINGS)
def test_every_reach_over_tokens_knows_what_all_ranks_see(name, cu):
    layer, given, weights = a_layer(name)
    ctx = context(cu, weights_T=weights)
    one, layout = handed(layer, given, ctx), make_layout("zigzag", TOKENS, 2)
    assert one and all(want.of_all is want and len(want) == TOKENS for want in one)

    def on_rank(transport):
        own, fresh = of_rank(transport, given, cu, weights, "all_gather", layout)
        return handed(deepcopy(layer), own, fresh())

    for rank, reaches in enumerate(simulate(2, on_rank)):
        index = layout.index(rank)
        for got, want in zip(reaches, one, strict=True):
            assert got.whole is not None and torch.equal(got.index_T, index)
            for bound in ("first_T", "last_T"):
                assert torch.equal(getattr(got.of_all, bound), getattr(want, bound))
                assert torch.equal(getattr(got, bound), getattr(want, bound)[index])
