"""How many keys and values of others a rank has at any time."""

from random import Random

import pytest
from longspan.parallel import fetch, ring
from longspan.parallel.gathering import Gathering
from longspan.parallel.shards import Arrival
from longspan.tests.parallel.resident import peaks
from longspan.tests.parallel.test_packings import owned_at_random
from longspan.tests.parallel.traced import HOW, Work, work

TOKENS, GROUPS, DIM = 32, 4, 8
SHARD = TOKENS * GROUPS * 2 * DIM * 4
"""Bytes of a rank's keys and values."""


def long(ranks, layout="zigzag", **fields):
    """`TOKENS` for each rank."""
    shape = {"groups": GROUPS, "dim": DIM, "value_dim": DIM}
    return work(TOKENS * ranks, ranks, layout, **(shape | fields))


def shards_of(monkeypatch, kind, how, given, field="received"):
    """The largest peak of a rank in a rank's keys and values, forward and backward."""
    with monkeypatch.context() as patch:
        found = peaks(patch, kind, how, given)
    return [max(getattr(peak, field) for peak in part) / SHARD
            for part in zip(*found, strict=True)]  # fmt: skip


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("ranks", [4, 8])
def test_a_ring_has_one_shard_and_the_next(monkeypatch, ranks, layout):
    # In the backward the sums of both as well.
    assert shards_of(monkeypatch, "ring", {}, long(ranks, layout)) == [2, 4]


@pytest.mark.parametrize(("inner", "most"), [(2, 3), (4, 4)])
def test_a_double_ring_has_two_more_at_most(monkeypatch, inner, most):
    # The one that went to the next node, and the one that comes from the node before.
    found = shards_of(monkeypatch, "double_ring", {"inner": inner}, long(2 * 4))
    assert found[0] <= most and found[1] <= most + 2
    assert found[0] > 2


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("ranks", [4, 8])
def test_fetching_has_one_round_and_the_next(monkeypatch, ranks, layout, window):
    found = shards_of(monkeypatch, "fetch", {}, long(ranks, layout, window=window))
    # In the backward gradients of this rank's keys from one round of readers.
    assert 0 < found[0] <= 2 and found[1] <= 2 + 1


def test_no_round_is_larger_than_the_largest_rank(monkeypatch):
    for seed in range(4):
        layout = owned_at_random(Random(seed), 200, 8)
        given = Work(layout, (0, 3, 90, 200), groups=GROUPS, dim=DIM, value_dim=DIM)
        found = shards_of(monkeypatch, "fetch", {}, given)
        largest = given.layout.largest / TOKENS
        assert found[0] <= 2 * largest and found[1] <= 3 * largest


def test_ulysses_has_the_keys_of_its_heads(monkeypatch):
    for ranks in (2, 4):
        found = shards_of(monkeypatch, "ulysses", {}, long(ranks))
        # Queries and keys of 8 and 4 heads, and all values; then what came of the others' heads.
        queries, keys = 2 * 0.5, 1
        assert found[0] == (ranks - 1) / ranks * (queries + keys)


@pytest.mark.parametrize("across", ["ring", "all_gather"])
def test_two_dimensions_have_what_is_across_for_their_own_heads(monkeypatch, across):
    how = {"inner": 2, "across": across}
    found = shards_of(monkeypatch, "two_d", how, long(8))
    assert found[0] <= 2 and found[1] <= 4


def test_an_all_gather_has_one_head_and_the_next(monkeypatch):
    # Twice the tokens over twice the ranks: only what is of the whole sequence grows.
    some, more = (shards_of(monkeypatch, "all_gather", {}, long(ranks), "made") for ranks in (4, 8))
    growth, head = [y - x for x, y in zip(some, more, strict=True)], 4 / GROUPS
    # In the backward the gradients of one head, and of one twice on their way into a message.
    assert growth == [2 * head, 5 * head]
    some, more = (shards_of(monkeypatch, "all_gather", {}, long(ranks)) for ranks in (4, 8))
    assert [y - x for x, y in zip(some, more, strict=True)] == [head, head]


@pytest.mark.parametrize("kind", ["ring", "double_ring", "fetch", "two_d"])
def test_no_rank_needs_more_for_a_longer_sequence_over_more_ranks(monkeypatch, kind):
    some, more = (shards_of(monkeypatch, kind, HOW[kind], long(ranks), "made") for ranks in (8, 16))
    assert some == more


@pytest.mark.parametrize("heads", [8, 16])
def test_ulysses_needs_what_its_heads_need(monkeypatch, heads):
    some, more = (
        shards_of(monkeypatch, "ulysses", {}, long(ranks, groups=8, heads=heads), "made")
        for ranks in (4, 8)
    )
    for few, many in zip(some, more, strict=True):
        # The share of what comes from others grows from 3 / 4 to 7 / 8.
        assert few <= many <= few * 1.1


def test_copies_that_stay_are_found(monkeypatch):
    kept = []
    for kind, module in [("ring", ring), ("fetch", fetch)]:
        monkeypatch.setattr(module, "Arrival", lambda *parts: kept.append(parts) or Arrival(*parts))
        assert shards_of(monkeypatch, kind, {}, long(4))[0] > 2
    start = Gathering.start
    monkeypatch.setattr(Gathering, "start", lambda *args: kept.append(start(*args)) or kept[-1])
    some, more = (shards_of(monkeypatch, "all_gather", {}, long(ranks), "made") for ranks in (4, 8))
    assert more[0] - some[0] > 2
