"""The exactness test of the exchanges fails where an exchange is wrong."""

from dataclasses import replace

import pytest
import torch
from longspan.kernels.mirror import Mirror
from longspan.kernels.reach import Reach
from longspan.kernels.windows import Windows
from longspan.parallel import layout, ring, shards
from longspan.parallel.entries import Entries
from longspan.parallel.gathering import Gathering
from longspan.parallel.halo import Halo
from longspan.parallel.head_trade import HeadTrade
from longspan.parallel.layout import make_layout
from longspan.parallel.ranges import Needs
from longspan.tests.parallel import test_exchange, test_halo, test_layout
from longspan.tests.parallel.ranks import DOCUMENTS

ARRIVING, INIT, SUM = ring.Ring._arriving, ring.Ring.__init__, Gathering.start_sum
GATHERING, REACHED = Gathering.__init__, Reach.keys
TRADE, PART, ENTRIES = Needs.trade, Windows.part, Entries.__init__
TRADING, IN_TURN = HeadTrade.__init__, layout._in_turn


def other_way_round(self):
    """Shards are taken for those that come from the next rank."""
    own, *others = ARRIVING(self)
    return [own, *reversed(others)]


def keys_one_later(self, layout, transport, route, **how):
    """Keys are taken for their successors."""
    INIT(self, layout, transport, route, **how)
    self._index = [index_S + 1 for index_S in self._index]


def plain_sum(out_THV, lse_TH, other_THV, other_TH):
    """Parts are not weighted by what each of them saw."""
    return (out_THV + other_THV) / 2, torch.logaddexp(lse_TH, other_TH)


def without_the_last(self, index_S):
    """Every query misses the last key that it should see of a shard."""
    local = REACHED(self, index_S)
    return Reach(local.first_T, torch.maximum(local.first_T, local.last_T - 1))


def by_rank(self, layout, transport):
    """Gathered tokens stay in the order of ranks."""
    GATHERING(self, layout, transport)
    self._places = Mirror(torch.arange(layout.length))


def own_part_only(self, parts_S):
    """The gradients that other ranks found are lost."""
    index = self.layout.index(self.transport.rank)
    SUM(self, parts_S)()
    return lambda: [part[index] for part in parts_S]


def one_too_short(self, rank, distances):
    """The last token of every halo is missing."""
    trade = TRADE(self, rank, distances)
    sends = [(peer, Mirror(rows.host[:-1])) for peer, rows in trade.sends]
    receives = [(peer, tokens - 1) for peer, tokens in trade.receives]
    parts = trade.index_S.split([tokens for _, tokens in trade.receives])
    index_S = torch.cat([trade.index_S[:0], *(part[:-1] for part in parts)])
    return trade._replace(sends=sends, receives=receives, index_S=index_S)


def tokens_by_rank(self, transport, members):
    """Tokens that were traded for heads stay in the order of ranks."""
    TRADING(self, transport, members)
    self._order = Mirror(torch.arange(len(self.index_N)))


@pytest.mark.parametrize(
    ("kind", "place", "name", "mutant"),
    [
        ("ring", ring.Ring, "_arriving", other_way_round),
        ("ring", ring.Ring, "__init__", keys_one_later),
        ("ring", shards, "merge", plain_sum),
        ("ring", Reach, "keys", without_the_last),
        ("all_gather", Gathering, "__init__", by_rank),
        ("all_gather", Gathering, "start_sum", own_part_only),
        ("double_ring", ring.Ring, "_arriving", other_way_round),
        ("fetch", Needs, "trade", one_too_short),
        ("ulysses", HeadTrade, "__init__", tokens_by_rank),
        ("two_d_ring", HeadTrade, "__init__", tokens_by_rank),
    ],
)
def test_a_wrong_exchange_is_found(monkeypatch, kind, place, name, mutant):
    case = 4, kind, "zigzag", DOCUMENTS, None
    test_exchange.test_any_number_of_ranks_is_exact_in_fp64(*case)
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises(AssertionError):
        test_exchange.test_any_number_of_ranks_is_exact_in_fp64(*case)


def kept_here(self, dx_L, tokens):
    """The gradients of a halo do not go home."""
    places = self.places.host
    own = places < tokens
    return dx_L.new_zeros(tokens, *dx_L.shape[1:]).index_copy_(0, places[own], dx_L[own])


def cells_of_its_own(self, rows, index_L):
    """A rank adds up keys in another order than one rank would."""
    return replace(PART(self, rows, index_L), given_C1=None)


def without_the_order(self, index_N, groups, tokens):
    """Entries come in ascending order and not in the wanted one."""
    ENTRIES(self, index_N, groups, tokens)
    self._back = Mirror(self._back.host.sort().values)


def exact_pooling():
    test_halo.check_pooled(make_layout("zigzag", 96, 4), Windows.documents(DOCUMENTS, 6, 2), 0)


def equal_means():
    windows = Windows.documents([0, 96], 32, 16)
    test_halo.check_means(make_layout("striped", 96, 4), windows, torch.float32, 0)


def exact_entries():
    test_halo.check_entries(make_layout("zigzag", 96, 4), torch.tensor([191, 0, 77, 0, 100]))


@pytest.mark.parametrize(
    ("check", "place", "name", "mutant"),
    [
        (exact_pooling, Needs, "trade", one_too_short),
        (exact_pooling, Halo, "send_back", kept_here),
        (exact_pooling, Gathering, "start_sum", own_part_only),
        (equal_means, Windows, "part", cells_of_its_own),
        (exact_entries, Entries, "__init__", without_the_order),
        (exact_entries, Gathering, "start_sum", own_part_only),
    ],
)
def test_what_is_made_of_many_keys_in_a_wrong_way_is_found(monkeypatch, check, place, name, mutant):
    check()
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises(AssertionError):
        check()


def one_chunk_later(sizes):
    """Every chunk is taken to begin one token later."""
    return [(start + 1, stop + 1) for start, stop in IN_TURN(sizes)]


def last_token_dropped(sizes):
    """The last token of a sequence is nobody's."""
    *others, (start, stop) = IN_TURN(sizes)
    return [*others, (start, stop - 1)]


@pytest.mark.parametrize("mutant", [one_chunk_later, last_token_dropped])
def test_a_wrong_zigzag_is_found(monkeypatch, mutant):
    case = "zigzag", 3, 48
    test_layout.test_every_token_has_one_owner_and_ranks_own_equally_many(*case)
    monkeypatch.setattr(layout, "_in_turn", mutant)
    with pytest.raises(AssertionError):
        test_layout.test_every_token_has_one_owner_and_ranks_own_equally_many(*case)
