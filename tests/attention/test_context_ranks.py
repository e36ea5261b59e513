"""Every mechanism over simulated context ranks: outputs, gradients, losses and choices of one."""

import os
from copy import deepcopy
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch
from longspan.attention.documents import Documents
from longspan.attention.notes import Notes
from longspan.attention.probe import Probe
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


def passes(layer, given, fresh):
    """Choices of a pass without gradients; output, gradients and losses of one with them."""
    kept, notes = {}, Notes()
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, fresh(kept=kept))
    layer.zero_grad(set_to_none=True)
    probe = Probe(1, TOKENS, torch.device("cpu"))
    out, grads = run(layer, given, fresh(notes=notes, probe=probe))
    chosen = {name: blocks.ids_QCN for name, blocks in kept.items()}
    return [out, *grads[:4]], grads[4:], learned(layer), notes.sums, chosen, probe


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


def check(name, ranks, kind, layout_kind, cu):
    stage, where = dict(CASES[name]), site()
    layer = make(stage.pop("mechanism", {"kind": "dense"}), where, **stage)
    given, weights = inputs(TOKENS, where), torch.rand(TOKENS).double()
    want = passes(layer, given, lambda **how: context(cu, weights_T=weights, **how))
    layout = make_layout(layout_kind, TOKENS, ranks)
    found = simulate(ranks, lambda t: on_rank(t, layer, given, cu, weights, kind, layout))
    local, parameters, by_loss, notes, chosen, probes = zip(*found, strict=True)
    one = want[5].table()[0]
    want[5].sums = sum(probe.sums for probe in probes)
    # Of a rank's rows: the alignment's mean is over its own weights.
    measured = {name: value for name, value in one.items() if name != "alignment"}
    got = {name: value for name, value in want[5].table()[0].items() if name != "alignment"}
    assert got == pytest.approx(measured, abs=1e-10)
    index = torch.cat([layout.index(rank) for rank in range(ranks)])
    order = index.argsort()
    together = [torch.cat(parts)[order] for parts in zip(*local, strict=True)]
    assert_all_close(together, want[0], atol=1e-10)
    for got, expected in ((parameters, want[1]), (by_loss, want[2])):
        for parts, one in zip(zip(*got, strict=True), expected, strict=True):
            torch.testing.assert_close(sum(parts), one, atol=1e-10, rtol=0)
    for label, pair in want[3].items():
        total = sum(sums[label] for sums in notes)
        torch.testing.assert_close(total, pair, atol=1e-10, rtol=1e-10)
    order = index[rows_that_choose(name, cu)[index]].argsort() if want[4] else order
    for label, ids in want[4].items():
        assert torch.equal(torch.cat([one[label] for one in chosen])[order], ids), label


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
        check(name, ranks, kind, layout_kind, cu)
