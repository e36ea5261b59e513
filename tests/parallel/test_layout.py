import subprocess
import sys

import pytest
import torch
from longspan.parallel.layout import Layout, make_layout

KINDS = ["zigzag", "contiguous", "striped"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 7, 48, 61, 5000])
def test_every_token_has_one_owner_and_ranks_own_equally_many(kind, ranks, length):
    layout = make_layout(kind, length, ranks)
    index = [layout.index(rank) for rank in range(ranks)]
    assert tuple(len(part) for part in index) == layout.sizes
    assert max(layout.sizes) == layout.largest == -(-length // ranks)
    assert min(layout.sizes) == length // ranks
    assert torch.equal(torch.cat(index).sort().values, torch.arange(length))
    assert all(bool((part.diff() > 0).all()) and part.dtype == torch.int64 for part in index)


def test_zigzag_pairs_an_early_chunk_with_a_late_one():
    assert make_layout("zigzag", 12, 3).chunks == (((0, 2), (10, 12)), ((2, 4), (8, 10)), ((4, 8),))
    assert make_layout("contiguous", 8, 2).chunks == (((0, 4),), ((4, 8),))


def test_zigzag_balances_causal_work():
    layout = make_layout("zigzag", 64, 4)
    assert len({int(layout.index(rank).sum()) for rank in range(4)}) == 1


def test_stripes_of_all_ranks_are_in_every_part_of_the_sequence():
    layout = make_layout("striped", 4096, 4)
    for rank in range(4):
        assert len(layout.chunks[rank]) == 16
        assert {stop - start for start, stop in layout.chunks[rank]} == {64}
        eighths = (layout.index(rank) // 512).bincount()
        assert eighths.tolist() == [128] * 8


def test_a_group_of_ranks_owns_what_its_members_own():
    layout = make_layout("zigzag", 61, 4)
    joined = layout.joined([(0, 1), (2, 3)])
    for group, members in enumerate([(0, 1), (2, 3)]):
        both = torch.cat([layout.index(rank) for rank in members])
        assert torch.equal(joined.index(group), both.sort().values)
    assert len(joined.chunks[1]) == 1


def test_ranks_may_own_nothing():
    layout = make_layout("zigzag", 2, 4)
    assert layout.sizes == (1, 1, 0, 0)
    assert layout.index(3).tolist() == []


def test_a_layout_needs_no_torch():
    code = (
        "import sys; from longspan.parallel.layout import make_layout; "
        "make_layout('striped', 8, 2); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layouts_are_equal_where_their_chunks_are():
    assert make_layout("contiguous", 4, 2) == Layout(4, (((0, 2),), ((2, 4),)))
