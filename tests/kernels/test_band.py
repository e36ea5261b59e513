"""Choices of which every row has its own block and some before it."""

import random

import pytest
import torch
from longspan.kernels.blocks import Blocks
from longspan.kernels.eager import band, by_block
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.kernels.scoring import Scoring
from reference.visibility import chosen, visible_in
from support.attention_cases import Case, assert_close_as_naive, run_case


def banded(seed, dtype=torch.float64):
    """A call whose rows all have their last `width` blocks, and others at random."""
    pick, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *(pick.randint(0, 90) for _ in range(pick.randint(1, 4)))]).cumsum(0)
    total, width = int(cu[-1]), pick.choice([1, 2, 5])
    grid = Grid.documents(cu, pick.choice([8, 13]))
    reach = Reach.documents(cu, pick.choice([None, None, 40]))
    groups, share = pick.choice([(1, 1), (2, 2), (2, 1)])
    first_T, stop_T = grid.span(reach)
    near = (stop_T[:, None] - 1 - torch.arange(width)).clamp(min=first_T[:, None])
    heads = pick.choice([1, groups, groups * share])
    others = torch.randint(-1, max(1, len(grid)), (total, heads, 3), generator=draw)
    ids = torch.cat([near[:, None].expand(-1, heads, -1), others], -1)
    blocks = Blocks.choose(ids, grid, check=True)
    visible = visible_in(reach.first_T, reach.last_T, total)
    visible = visible & chosen(
        blocks.ids_QCN, grid.starts_B1, torch.arange(total), groups * share, total
    )
    shapes = [(total, groups * share, 5), (total, groups, 5), (total, groups, 4)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]
    return Case(*tensors, reach, blocks, visible, dlse=pick.random() < 0.5), width


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_twin(seed, dtype):
    case, width = banded(seed, dtype)
    first_T, stop_T = case.blocks.grid.span(case.reach)
    if len(case.q):
        most = int((stop_T - first_T).max())
        assert band._band(case.q, case.reach, case.blocks, Scoring(1.0)) >= min(width, most)
    got, given = run_case(case)
    assert_close_as_naive(case, got, given)


def test_the_band_is_what_all_rows_and_heads_have(monkeypatch):
    grid, reach = Grid.documents([0, 40], 8), Reach.documents([0, 40])
    own = torch.arange(40) // 8
    ids = torch.stack([own, own - 1, torch.zeros_like(own)], -1)[:, None].expand(-1, 2, -1)
    q = torch.zeros(40, 2, 4)

    def width(ids, scoring=None, starts=None):
        blocks = Blocks.choose(ids, grid, starts)
        return band._band(q, reach, blocks, scoring or Scoring(1.0))

    assert width(ids) == 2
    fewer = ids.clone()
    fewer[30, 1, 1] = -1  # one head of one row
    assert width(fewer) == 1
    fewer[39, 0, 0] = 1
    assert width(fewer) == 0
    assert width(torch.arange(5).expand(40, 1, -1)) == 5
    monkeypatch.setattr(band, "MOST", 3)
    assert width(torch.arange(5).expand(40, 1, -1)) == 3
    assert width(ids, Scoring(1.0, softcap=2.0)) == 0
    assert width(ids[::2], starts=range(0, 41, 2)) == 0


def test_the_rest_goes_block_by_block(monkeypatch):
    """Nothing that the band has is computed twice."""
    seen = []
    original = by_block.forward
    monkeypatch.setattr(by_block, "forward", lambda *a: seen.append(a[3]) or original(*a))
    case, _ = banded(3)
    near, far = band._split(case.reach, case.blocks.grid, 2)
    assert near.area() + far.area() == case.reach.area() and near.area() > 0
    run_case(case)
    assert len(seen) == 1 and seen[0].area() < case.reach.area()
