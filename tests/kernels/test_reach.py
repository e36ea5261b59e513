from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.pieces import TILE_ROWS
from longspan.kernels.reach import Reach


def visible(reach: Reach, keys: int) -> torch.Tensor:
    key_S = torch.arange(keys)
    return (key_S >= reach.first_T[:, None]) & (key_S < reach.last_T[:, None])


def by_definition(cu_seqlens, window):
    total = cu_seqlens[-1]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for start, stop in pairwise(cu_seqlens):
        for row in range(start, stop):
            for key in range(start, row + 1):
                mask[row, key] = window is None or row - key < window
    return mask


def covered(reach: Reach, keys: int) -> torch.Tensor:
    """How often the pieces compute each pair."""
    count = torch.zeros(len(reach), keys, dtype=torch.int64)
    for group in reach.pieces:
        rows = group.stop - group.start
        for piece in group.pieces:
            part = torch.ones(rows, piece.last - piece.first, dtype=torch.int64)
            if piece.kind == "causal":
                assert part.shape[0] == part.shape[1]
                part = part.tril()
            if piece.kind == "masked":
                part &= visible(reach, keys)[group.start : group.stop, piece.first : piece.last]
            assert bool((part.sum(1) > 0).all())
            count[group.start : group.stop, piece.first : piece.last] += part
    return count


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_documents_is_causality_inside_documents(window):
    cu = [0, 1, 2, 7, 7, 20]
    reach = Reach.documents(torch.tensor(cu, dtype=torch.int32), window)
    assert torch.equal(visible(reach, 20), by_definition(cu, window))
    assert reach.area() == int(by_definition(cu, window).sum())
    assert (reach.cu_seqlens, reach.window) == (tuple(cu), window)


def test_rows_and_keys_restrict_and_forget_how_the_reach_was_built():
    reach = Reach.documents([0, 5, 12])
    mask = visible(reach, 12)
    rows, keys = torch.tensor([2, 3, 9]), torch.tensor([1, 2, 6, 11])
    local = reach.rows(rows).keys(keys)
    assert torch.equal(visible(local, 4), mask[rows][:, keys])
    assert local.cu_seqlens is None and reach.rows(rows).cu_seqlens is None


def test_restriction_to_everything_keeps_the_reach():
    reach = Reach.documents([0, 5, 12])
    assert reach.rows(torch.arange(12)).keys(torch.arange(12)) is reach


def test_rows_remember_the_reach_of_all_rows_until_the_keys_are_others():
    reach = Reach.documents([0, 5, 12], 3)
    assert reach.of_all is reach and reach.index_T is None
    index = torch.tensor([9, 2, 3, 11])
    part = reach.rows(index)
    assert part.of_all is reach and torch.equal(part.index_T, index)
    assert part.rows(torch.arange(4)) is part
    of_part = part.rows(torch.tensor([3, 1]))
    assert of_part.of_all is reach and of_part.index_T.tolist() == [11, 2]
    for some in (part, of_part):
        assert torch.equal(some.first_T, reach.first_T[some.index_T])
        assert torch.equal(some.last_T, reach.last_T[some.index_T])
    # Also where the keys that these rows see, or none, keep their numbers.
    for rows, keys in (([9, 2], [1, 2, 8, 9]), ([0, 1], range(5)), ([0, 1], range(7, 9))):
        local = reach.rows(torch.tensor(rows)).keys(torch.tensor(list(keys)))
        assert local.of_all is local and local.index_T is None


def test_empty():
    reach = Reach.documents([0, 5, 12])
    later = reach.rows(torch.arange(5)).keys(torch.arange(5, 12))
    assert later.empty and not later.pieces and later.area() == 0 and later.span == (0, 0)
    assert not reach.empty and reach.keys(torch.arange(5, 12)).span == (5, 12)
    assert Reach.documents([0]).empty


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_pieces_cover_every_visible_pair_once(data):
    lengths = data.draw(st.lists(st.integers(1, 60) | st.integers(100, 300), max_size=8))
    window = data.draw(st.none() | st.integers(1, 100))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    keep = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    keys = (torch.rand(total, generator=generator) < keep).nonzero()[:, 0]
    rows = torch.arange(data.draw(st.integers(0, total)), total)
    reach = Reach.documents(cu, window).rows(rows).keys(keys)
    assert torch.equal(covered(reach, len(keys)), visible(reach, len(keys)).long())


def test_one_document_is_one_piece_and_a_late_chunk_is_two():
    reach = Reach.documents([0, 4096])
    (group,) = reach.pieces
    assert [piece.kind for piece in group.pieces] == ["causal"]
    late = reach.rows(torch.arange(1024, 2048))
    (group,) = late.pieces
    assert [piece.kind for piece in group.pieces] == ["full", "causal"]
    assert [piece.kind for piece in late.keys(torch.arange(512)).pieces[0].pieces] == ["full"]


@pytest.mark.parametrize(
    "reach",
    [
        Reach.documents([0, 2**18], 512),
        Reach.documents(torch.arange(0, 2**18 + 1, 5)),
        Reach.documents([0, 2**18]).keys(torch.arange(0, 2**18, 2)),
    ],
    ids=["window", "short-documents", "every-other-key"],
)
def test_plans_of_long_sequences_are_few_and_tight(reach):
    rows = 2**18
    assert len(reach.pieces) <= 4 * rows // TILE_ROWS
    pairs = sum(
        (group.stop - group.start) * (piece.last - piece.first)
        for group in reach.pieces
        for piece in group.pieces
    )
    assert pairs <= 4 * reach.area() + 4096 * len(reach.pieces)
