"""Bytes that are sent, against the closed forms."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
from longspan.parallel.traffic import CountedTransport, Traffic
from longspan.parallel.volume import Call, volume_of, volume_of_gathering
from longspan.tests.parallel.test_packings import owned_at_random
from longspan.tests.parallel.traced import BYTES, HOW, Work, gloo_trace, traces, work
from support.grid import sample

DOCUMENTS = {96: (0, 1, 20, 50, 96), 61: (0, 7, 40, 61)}
EXCHANGES = [
    *HOW.items(),
    ("two_d", {"inner": 2, "across": "all_gather"}),
    # Four ranks of a node have more heads than there are key-value heads.
    ("two_d", {"inner": 4, "across": "ring"}),
    ("two_d", {"inner": 4, "across": "all_gather"}),
    ("double_ring", {"inner": 4}),
    ("double_ring", {"inner": 1}),
    ("two_d", {"inner": 1, "across": "ring"}),
]
CASES = list(
    product(("zigzag", "random"), DOCUMENTS, BYTES, (1, 2, 4), ("none", "one", "groups", "heads"))
)


def closed(kind, how, given, rank):
    needs = given.needs if kind == "fetch" else None
    return volume_of(kind, given.layout.sizes, rank, given.call, needs=needs, **how)


@pytest.mark.parametrize(
    ("kind", "how", "ranks"),
    [(*x, ranks) for x in EXCHANGES for ranks in (2, 4, 8) if x[1].get("inner", 1) <= ranks],
)
def test_an_exchange_sends_what_the_closed_form_says(kind, how, ranks):
    random = Random(f"{kind} {how} {ranks}")
    cases = sample(f"{kind} {how} {ranks}", CASES, 16 // ranks)
    for owned, length, dtype, groups, chosen in cases:
        uneven = owned == "random"
        layout = (owned_at_random(random, length, ranks) if uneven
                  else make_layout("zigzag", length, ranks))  # fmt: skip
        choosers = {"none": 0, "one": 1, "groups": groups, "heads": 8}[chosen]
        learns_lse = random.random() < 0.5
        given = Work(layout, DOCUMENTS[length], groups, dtype, choosers, learns_lse)
        for rank, found in enumerate(traces(kind, how, given)):
            assert found.volume == closed(kind, how, given, rank), (given, rank)


@pytest.mark.parametrize(("kind", "how"), [x for x in HOW.items() if x[0] != "ulysses"])
def test_keys_that_are_kept_do_not_travel_again(kind, how):
    given = work(61, 4, cu=DOCUMENTS[61])
    kept, needs = replace(given.call, keeps=True), given.needs if kind == "fetch" else None
    for rank, found in enumerate(traces(kind, {**how, "keeps": True}, given)):
        want = volume_of(kind, given.layout.sizes, rank, kept, needs=needs, **how)
        again = closed(kind, how, given, rank)
        assert found.volume == want
        assert want.forward == again.forward and want.backward <= again.backward
        assert want.backward < again.backward or not want.forward


@pytest.mark.parametrize(("kind", "how"), HOW.items())
def test_real_ranks_send_what_the_closed_form_says(worlds, kind, how):
    given = work(61, 2, cu=DOCUMENTS[61], choosers=2, dtype=torch.bfloat16)
    for rank, found in enumerate(worlds(2).run(gloo_trace, kind, how, given)):
        assert found.volume == closed(kind, how, given, rank)


def test_even_rings_and_gatherings_are_those_of_the_papers():
    call, sizes = Call(8, 2, 6, 4, wire=2), [12] * 8
    shard = 12 * 2 * (6 + 4)
    ring = volume_of("ring", sizes, 3, call)
    assert ring == (7 * shard * 2, 7 * shard * 2 + 8 * shard * 4)
    assert volume_of("double_ring", sizes, 3, call, inner=4) == ring
    assert volume_of("all_gather", sizes, 3, call) == (7 * shard * 2, 7 * shard * (2 + 4))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_even_heads_traded_are_those_of_the_paper(ranks):
    call, share = Call(32, 8, 128, 128, wire=2), (ranks - 1) / ranks
    found = volume_of("ulysses", [1024] * ranks, 0, call)
    lse = share * 1024 * 32 * 4
    assert found == (share * 1024 * 40 * 256 * 2 + lse, share * 1024 * 40 * 256 * 2)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_fetching_causal_zigzag_sends_three_quarters_of_a_ring(ranks):
    given = work(16 * ranks, ranks)
    forward, backward = (
        sum(part) for part in zip(*(closed("fetch", {}, given, rank) for rank in range(ranks)),
                                  strict=True)
    )  # fmt: skip
    ring = volume_of("ring", given.layout.sizes, 0, given.call)
    assert forward == 0.75 * ranks * ring.forward
    # A ring's gradients make one hop more than its keys.
    assert backward == 0.75 * ranks * 2 * ring.forward < 0.75 * ranks * ring.backward


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("length", DOCUMENTS)
def test_gathering_sends_what_the_closed_form_says(length, ranks, dtype):
    layout = make_layout("zigzag", length, ranks)

    def body(transport):
        traffic = Traffic()
        exchange = make_exchange("ring", layout, CountedTransport(transport, traffic))
        x = torch.ones(layout.sizes[transport.rank], 2, 6, dtype=dtype, requires_grad=True)
        out = exchange.gather(x)
        forward = traffic.take()
        out.float().sum().backward()
        return forward, traffic.take()

    want = volume_of_gathering(ranks, layout.largest, 12, *BYTES[dtype], learns=True)
    assert simulate(ranks, body) == [want] * ranks


@pytest.mark.parametrize("kind", HOW)
def test_one_rank_sends_nothing(kind):
    assert volume_of(kind, [64], 0, Call(8, 2, 6, 4, 2)) == (0, 0)


def test_the_closed_forms_need_no_torch():
    code = "import sys, longspan.parallel.volume; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
