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
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
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


def on_rank(transport, layer, given, cu, weights, kind, layout):
    """`passes` of one context rank."""
    index = layout.index(transport.rank)
    own = Inputs(*(x[index] for x in vars(given).values()))
    positions = positions_of(cu)[index]

    def fresh(**changes):
        return replace(
            context(cu, weights_T=weights[index], **changes),
            cp=make_exchange(kind, layout, transport),
            documents=Documents(cu, index),
            positions_T=positions,
            positions_S=positions,
        )

    return passes(deepcopy(layer), own, fresh)


def rows_that_choose(name, cu):
    """Which rows are in the lists of choices: InfLLM-V2's short documents are not."""
    below = CASES[name].get("mechanism", {}).get("dense_below", 0)
    sizes = torch.tensor(cu).diff()
    return torch.repeat_interleave(sizes >= below, sizes)


def one_and_many(name, ranks, kind, layout_kind, cu):
    """By name what one rank computes, and what context ranks do together."""
    stage, where = dict(CASES[name]), site()
    layer = make(stage.pop("mechanism", {"kind": "dense"}), where, **stage)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)).double()
    given = inputs(TOKENS, where)
    want = passes(layer, given, lambda **how: context(cu, weights_T=weights, **how))
    layout = make_layout(layout_kind, TOKENS, ranks)
    found = simulate(ranks, lambda t: on_rank(t, layer, given, cu, weights, kind, layout))
    index = torch.cat([layout.index(rank) for rank in range(ranks)])
    chose = index[rows_that_choose(name, cu)[index]] if want.chosen else index
    together = Passes(
        [torch.cat(parts)[index.argsort()] for parts in zip(*(x.rows for x in found), strict=True)],
        [sum(parts) for parts in zip(*(x.summed for x in found), strict=True)],
        {label: sum(x.notes[label] for x in found) for label in want.notes},
        {
            label: torch.cat([x.chosen[label] for x in found])[chose.argsort()]
            for label in want.chosen
        },
        sum(x.measured for x in found),
    )
    return want, together


def sampled(name, ranks):
    """A third of the grid, another one for each case; all of it where the environment asks."""
    grid = list(product(("ring", "all_gather"), ("zigzag", "contiguous"), PACKINGS.values()))
    if os.environ.get("LONGSPAN_TEST_GRID") == "full":
        return grid
    Random(f"{name} {ranks}").shuffle(grid)
    return grid[::3]


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
