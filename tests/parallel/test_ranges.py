"""What ranks need of each other, against every token's visibility."""

import importlib.util
from itertools import pairwise
from pathlib import Path
from random import Random

import longspan
import pytest
import torch
from longspan.attention.pairs import dense
from longspan.kernels.reach import Reach
from longspan.parallel.layout import balanced_layout, make_layout
from longspan.parallel.ranges import Needs
from longspan.parallel.volume import Call, volume_of
from longspan.tests.parallel.test_packings import owned_at_random

TOKENS = 8192


def drawn(name, ranks):
    """Boundaries of documents as they occur, `TOKENS` for each rank."""
    path = Path(longspan.__file__).parent / "benchmarks/histogram.py"
    spec = importlib.util.spec_from_file_location("histogram", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.packed(name, ranks * TOKENS, 0)


def seen_by(reach, rows):
    """Which keys some of the rows see: each one's interval, begun and ended."""
    edges = torch.zeros(len(reach) + 1, dtype=torch.int64)
    some = rows[reach.first_T[rows] < reach.last_T[rows]]
    for bound_T, step in ((reach.first_T, 1), (reach.last_T, -1)):
        edges.index_add_(0, bound_T[some], torch.full((len(some),), step))
    return edges.cumsum(0)[:-1] > 0


def assert_needed(reach, layout):
    """Every rank asks each owner for exactly the tokens that its rows see."""
    needs = Needs(reach, layout)
    counts = needs.counts()
    for rank in range(layout.ranks):
        seen = seen_by(reach, layout.index(rank))
        for owner in range(layout.ranks):
            index = layout.index(owner)
            got = needs.positions(owner, needs.of(rank, owner))
            assert torch.equal(got, index[seen[index]])
            assert counts[rank, owner] == len(got)
    return counts


@pytest.mark.parametrize("seed", range(30))
def test_needs_are_what_rows_see_of_any_reach_and_owners(seed):
    random, draw = Random(seed), torch.Generator().manual_seed(seed)
    length, ranks = random.randrange(20, 90), random.choice([2, 3, 8])
    first = torch.randint(0, length, (length,), generator=draw)
    # Some rows see nothing; bounds neither ascend nor nest.
    last = (first + torch.randint(-3, 12, (length,), generator=draw)).clamp(0, length)
    reach = [Reach(first, last), Reach.documents([0, 5, 5, length], random.choice([None, 3]))]
    assert_needed(reach[seed % 2], owned_at_random(random, length, ranks))


@pytest.mark.parametrize("name", ["pile", "prolong64k", "prolong512k"])
def test_fetching_documents_as_they_occur_is_balanced_and_brings_nothing_unused(name):
    ranks = 8
    cu = drawn(name, ranks)
    reach, layout = Reach.documents(cu), balanced_layout(cu, ranks, dense)
    needs = assert_needed(reach, layout).fill_diagonal_(0)
    # Forward a message to each reader; backward that again, and one to each owner.
    messages = 2 * (needs > 0).sum(0) + (needs > 0).sum(1)
    assert int(messages.max()) <= 4 * ranks
    assert max(layout.sizes) <= 1.1 * cu[-1] / ranks
    loads = [reach.rows(layout.index(rank)).area() for rank in range(ranks)]
    assert max(loads) <= 1.05 * sum(loads) / ranks
    assert sum(loads) == sum(dense(stop - start) for start, stop in pairwise(cu))
    call = Call(64, 4, 128, 128, wire=2)
    sent = [sum(volume_of("fetch", layout.sizes, rank, call, needs=needs.tolist()))
            for rank in range(ranks)]  # fmt: skip
    ring = [sum(volume_of("ring", layout.sizes, rank, call)) for rank in range(ranks)]
    assert sum(sent) < 0.5 * sum(ring)


def test_in_zigzag_no_rank_needs_the_late_chunks_of_the_ranks_before_it():
    layout, half = make_layout("zigzag", 160, 8), 10
    needs = Needs(Reach.documents([0, 160]), layout).counts()
    assert needs.tolist() == [
        [half if owner < rank else 2 * half for owner in range(8)] for rank in range(8)
    ]
