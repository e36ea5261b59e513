"""What every rank sends to whom and in which order: each exchange is what it says."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from longspan.parallel.traffic import Message
from longspan.tests.parallel.traced import HOW, gloo_trace, traces, work

NUMBERS = 2 * (6 + 4)
"""Keys and values of a token."""


def kinds_and_peers(trace):
    return [[(message.kind, message.peer) for message in messages] for messages in trace]


def peers(messages):
    return [message.peer for message in messages]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ring_sends_to_the_next_rank_only(ranks):
    shard = 96 // ranks * NUMBERS
    for rank, found in enumerate(traces("ring", {}, work(ranks=ranks, dtype=torch.bfloat16))):
        following = (rank + 1) % ranks
        keys, sums = (Message("send", shard * size, following) for size in (2, 4))
        assert found.forward == (keys,) * (ranks - 1)
        # The next shard is on its way before the gradients of one are there.
        assert found.backward == (keys, sums) * (ranks - 1) + (sums,)


@pytest.mark.parametrize(("ranks", "inner"), [(4, 2), (8, 2), (8, 4)])
def test_a_double_ring_crosses_nodes_once_for_all_steps_inside(ranks, inner):
    nodes, shard = ranks // inner, 96 // ranks * NUMBERS * 4
    given = work(ranks=ranks)
    for rank, found in enumerate(traces("double_ring", {"inner": inner}, given)):
        node, place = divmod(rank, inner)
        within = node * inner + (place + 1) % inner
        across = (node + 1) % nodes * inner + place
        # What crosses leaves as soon as it is there, and is used `inner` steps later.
        tour = [Message("send", shard, within)] * (inner - 1)
        there = Message("send", shard, across)
        want = []
        for step in range(nodes):
            want += [tour[0]] + [there] * (step < nodes - 1) + tour[1:]
        assert found.forward == tuple(want)
        assert peers(found.forward).count(across) == nodes - 1
        # The gradients of a shard go home with it: one hop across for all steps inside.
        home = Counter(peers(found.backward)) - Counter(peers(found.forward))
        assert sum(home.values()) == ranks
        crossing = sum(count for peer, count in home.items() if peer // inner != node)
        assert crossing == nodes


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_all_gather_is_a_collective_for_each_key_value_head(groups):
    rows = 3 * 24 * (6 + 4)
    gathered, summed = (
        Message("all_gather", rows * 2),
        Message("reduce_scatter", rows * 4),
    )
    for found in traces("all_gather", {}, work(groups=groups, dtype=torch.bfloat16)):
        assert found.forward == (gathered,) * groups
        # A head is on its way while another one is computed, there and back.
        alternating = (gathered, *(gathered, summed) * (groups - 1), summed)
        assert found.backward == alternating


@pytest.mark.parametrize(("dtype", "dtypes"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_sends_each_rank_a_message_there_and_back_for_each_dtype(ranks, dtype, dtypes):
    shared = ranks > 2
    for rank, found in enumerate(traces("ulysses", {}, work(ranks=ranks, dtype=dtype))):
        others = [peer for peer in range(ranks) if peer != rank]
        # The lse returns in fp32, as do gradients of keys that several ranks have.
        twice = [peer for peer in others for _ in range(dtypes)]
        assert peers(found.forward) == others + twice
        assert peers(found.backward) == others + (twice if shared else others)
        assert {message.kind for message in found.forward + found.backward} == {"send"}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cu", [(0, 96), (0, 1, 20, 50, 96), tuple(range(97))])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_fetched_keys_go_straight_to_their_readers_and_gradients_straight_back(layout, cu, window):
    given, ranks = work(ranks=8, layout=layout, cu=cu, window=window), 8
    needs = given.needs
    for rank, found in enumerate(traces("fetch", {}, given)):
        readers = {peer: needs[peer][rank] for peer in range(ranks) if peer != rank}
        owners = {peer: needs[rank][peer] for peer in range(ranks) if peer != rank}
        keys = [Message("send", tokens * NUMBERS * 4, peer)
                for peer, tokens in readers.items() if tokens]  # fmt: skip
        back = [Message("send", tokens * NUMBERS * 4, peer)
                for peer, tokens in owners.items() if tokens]  # fmt: skip
        assert Counter(found.forward) == Counter(keys)
        assert Counter(found.backward) == Counter(keys + back)
        # Near ones first.
        distances = [(peer - rank) % ranks for peer in peers(found.forward)]
        assert distances == sorted(distances)
        assert len(found.forward) <= ranks - 1 and len(found.backward) <= 2 * (ranks - 1)
        assert len(found.forward) + len(found.backward) <= 4 * ranks


def test_fetching_a_window_asks_neighbours_only():
    given = work(ranks=8, layout="contiguous", window=7)
    for rank, found in enumerate(traces("fetch", {}, given)):
        halo = [Message("send", 6 * NUMBERS * 4, rank + 1)] if rank < 7 else []
        assert list(found.forward) == halo


@pytest.mark.parametrize("across", ["ring", "all_gather"])
@pytest.mark.parametrize(("ranks", "inner"), [(4, 2), (8, 2), (8, 4)])
def test_two_dimensions_trade_inside_nodes_and_send_own_heads_across(ranks, inner, across):
    how = {"inner": inner, "across": across}
    for rank, found in enumerate(traces("two_d", how, work(ranks=ranks, groups=4))):
        node, place = divmod(rank, inner)
        neighbours = [peer for peer in range(node * inner, (node + 1) * inner) if peer != rank]
        at_place = [peer for peer in range(place, ranks, inner) if peer != rank]
        nodes, heads = ranks // inner, 4 // inner
        if across == "ring":
            following = (rank + inner) % ranks
            there, back = [following] * (nodes - 1), [following] * (2 * nodes - 1)
        else:
            there, back = at_place * heads, at_place * 2 * heads
        assert peers(found.forward) == neighbours + there + neighbours
        assert peers(found.backward) == neighbours + back + neighbours


def test_no_two_exchanges_send_the_same():
    given = work()
    found = {kind: traces(kind, how, given) for kind, how in HOW.items()}
    for one, other in combinations(found, 2):
        for mine, theirs in zip(found[one], found[other], strict=True):
            assert kinds_and_peers(mine) != kinds_and_peers(theirs), (one, other)


@pytest.mark.parametrize(("kind", "how"), HOW.items())
def test_real_ranks_send_what_simulated_ones_do(worlds, kind, how):
    given = work(61, 2, cu=(0, 7, 40, 61))
    assert worlds(2).run(gloo_trace, kind, how, given) == traces(kind, how, given)
