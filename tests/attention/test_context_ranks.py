"""Every mechanism over simulated context ranks: outputs, gradients, losses and choices of one."""

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import pytest
import torch
from longspan.attention.documents import Documents
from longspan.attention.notes import Notes
from longspan.attention.probe import MEASURES, Probe
from longspan.kernels.windows import Windows
from longspan.parallel.gathering import Gathering
from longspan.parallel.halo import Halo
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
from longspan.parallel.traffic import CountedTransport, Traffic
from longspan.parallel.volume import volume_of_gathering
from longspan.tests.parallel.ranks import EXCHANGES, exchange_of, together
from longspan.tests.parallel.test_packings import owned_at_random
from support.grid import sample
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

PACKINGS = {
    "packed": [0, 1, 20, 25, 90, 96],
    "one": [0, 96],
    "many": list(range(0, 97, 3)),
    "odd": [0, 30, 31, 97],
}
LAYOUTS = ["zigzag", "contiguous", "striped"]
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
    probe = Probe(1, len(given.q), torch.device("cpu"))
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


def a_layer(name, tokens):
    """A case's layer, inputs and loss weights."""
    stage, where = dict(CASES[name]), site()
    layer = make(stage.pop("mechanism", {"kind": "dense"}), where, **stage)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(2)).double()
    return layer, inputs(tokens, where), weights


def one_and_many(name, kind, layout, cu):
    """What one rank computes, and what the context ranks of a layout do together."""
    layer, given, weights = a_layer(name, cu[-1])
    want = passes(layer, given, lambda **how: context(cu, weights_T=weights, **how))

    def on_rank(transport):
        return passes(deepcopy(layer), *of_rank(transport, given, cu, weights, kind, layout))

    found = simulate(layout.ranks, on_rank)
    chosen = together(layout, [x.chosen.values() for x in found])
    many = Passes(
        together(layout, [x.rows for x in found]),
        [sum(parts) for parts in zip(*(x.summed for x in found), strict=True)],
        {label: sum(x.notes[label] for x in found) for label in want.notes},
        dict(zip(want.chosen, chosen, strict=True)),
        sum(x.measured for x in found),
    )
    return want, many


def grid(ranks):
    """Exchanges, layouts and boundaries of documents."""
    # There are 4 query heads.
    exchanges = [exchange for exchange in EXCHANGES if ranks <= 4 or exchange != "ulysses"]
    return product(exchanges, LAYOUTS, PACKINGS.values())


def assert_one_rank(name, kind, layout, cu):
    """Everything that context ranks find together is what one rank finds."""
    one, many = one_and_many(name, kind, layout, cu)
    assert_all_close(many.rows, one.rows, atol=1e-10)
    for got, want in zip(many.summed, one.summed, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    for label, want in one.notes.items():
        torch.testing.assert_close(many.notes[label], want, atol=1e-10, rtol=1e-10)
    for label, ids in one.chosen.items():
        assert torch.equal(many.chosen[label], ids), label
    torch.testing.assert_close(many.means(), one.means(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_context_ranks_are_one_rank_in_fp64(name, ranks):
    for kind, layout_kind, cu in sample(f"{name} {ranks}", grid(ranks), 8 // ranks):
        assert_one_rank(name, kind, make_layout(layout_kind, cu[-1], ranks), cu)


@pytest.mark.parametrize("name", CASES)
def test_ranks_may_own_any_tokens_or_none(name):
    random, cu = Random(name), PACKINGS["odd"]
    for exchange in sample(f"{name} any", EXCHANGES, 2):
        assert_one_rank(name, exchange, owned_at_random(random, cu[-1], 4), cu)


class Recording:
    """An exchange that remembers the reaches over keys that live where their tokens do."""

    def __init__(self, exchange):
        self.exchange, self.reaches = exchange, []

    def __getattr__(self, name):
        return getattr(self.exchange, name)

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
    layer, given, weights = a_layer(name, cu[-1])
    ctx = context(cu, weights_T=weights)
    one, layout = handed(layer, given, ctx), make_layout("zigzag", cu[-1], 2)
    assert one and all(want.of_all is want and len(want) == cu[-1] for want in one)

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


class Apart:
    """An exchange whose attention does not count as traffic."""

    def __init__(self, exchange, traffic):
        self.exchange, self.traffic = exchange, traffic

    def __getattr__(self, name):
        return getattr(self.exchange, name)

    def attend(self, *args, **how):
        before = len(self.traffic.messages)
        found = self.exchange.attend(*args, **how)
        del self.traffic.messages[before:]
        return found


def beside_attention(name, layout, cu):
    """Bytes that each rank sends in an evaluation, apart from those of attention."""
    layer, given, weights = a_layer(name, cu[-1])

    def on_rank(transport):
        traffic = Traffic()
        counted = CountedTransport(transport, traffic)
        own, fresh = of_rank(counted, given, cu, weights, "fetch", layout)
        ctx = fresh(training=False, learns=False)
        with torch.no_grad():
            now = replace(ctx, cp=Apart(ctx.cp, traffic))
            deepcopy(layer)(own.hidden, own.q, own.k, own.v, now)
        return traffic.take()

    return simulate(layout.ranks, on_rank)


NUMBERS, WIRE = 16, 8  # of the keys of a token, bytes of each
POOLED = {
    "infllm_v2": [(4, 2, 1), (8, 4, 1)],
    "moba": [(4, 4, 1)],
    "ssa": [(4, 4, 1)],
    "nsa": [(4, 2, 1), (4, 2, 1)],
    "nsa_token_gate": [(4, 4, 1), (4, 4, 1)],
    "seer": [(4, 4, 3)],
}
"""What is made of keys: length and stride of the windows, keys that a window becomes."""


@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("name", POOLED)
def test_what_a_selection_sends_beside_attention_is_windows_and_halos(name, layout_kind):
    cu, ranks = [0, 96], 4
    layout = make_layout(layout_kind, cu[-1], ranks)

    def want(transport):
        made = [(Windows.documents(cu, *size), keys) for *size, keys in POOLED[name]]
        halos = [(Halo.of(windows, Gathering(layout, transport)), keys) for windows, keys in made]
        return sum(
            halo.volume(NUMBERS, keys * NUMBERS, WIRE, learns=False).forward for halo, keys in halos
        )

    found = beside_attention(name, layout, cu)
    assert found == simulate(ranks, want)
    if layout_kind != "striped":  # with stripes of 3 tokens all windows straddle edges
        tensors = 2 if "nsa" in name else 1  # values too
        keys = volume_of_gathering(ranks, 24, NUMBERS, WIRE, learns=False).forward
        assert 0 < max(found) < tensors * keys


def test_sharded_heads_send_each_head_its_shard_only():
    layout = make_layout("contiguous", 96, 4)
    # Each key-value head serves two heads, which see two of every four blocks.
    half = volume_of_gathering(4, 24, NUMBERS // 2, WIRE, learns=False).forward
    assert beside_attention("sharded_heads", layout, [0, 96]) == [2 * half] * 4
