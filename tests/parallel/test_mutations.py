"""The exactness test of the exchanges fails where an exchange is wrong."""

import pytest
import torch
from longspan.kernels.mirror import Mirror
from longspan.kernels.reach import Reach
from longspan.parallel import ring, shards
from longspan.parallel.gathering import Gathering
from longspan.tests.parallel import test_exchange
from longspan.tests.parallel.ranks import DOCUMENTS

ARRIVING, INIT, SUM = ring.Ring._arriving, ring.Ring.__init__, Gathering.start_sum
GATHERING, REACHED = Gathering.__init__, Reach.keys


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


@pytest.mark.parametrize(
    ("kind", "place", "name", "mutant"),
    [
        ("ring", ring.Ring, "_arriving", other_way_round),
        ("ring", ring.Ring, "__init__", keys_one_later),
        ("ring", shards, "merge", plain_sum),
        ("ring", Reach, "keys", without_the_last),
        ("all_gather", Gathering, "__init__", by_rank),
        ("all_gather", Gathering, "start_sum", own_part_only),
    ],
)
def test_a_wrong_exchange_is_found(monkeypatch, kind, place, name, mutant):
    case = 4, kind, "zigzag", DOCUMENTS, None
    test_exchange.test_any_number_of_ranks_is_exact_in_fp64(*case)
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises(AssertionError):
        test_exchange.test_any_number_of_ranks_is_exact_in_fp64(*case)
