"""How uneven layouts are, against the reach of every token."""

import pytest
import torch
from longspan.attention.pairs import dense, ramp
from longspan.kernels.reach import Reach
from longspan.parallel.imbalance import imbalance, loads_of
from longspan.parallel.layout import Layout, make_layout

CU = [0, 1, 20, 20, 50, 96, 97]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 120])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "striped"])
def test_loads_are_the_pairs_that_each_rank_s_tokens_see(kind, ranks, window):
    layout = make_layout(kind, CU[-1], ranks)
    reach = Reach.documents(CU, window)
    want = [reach.rows(layout.index(rank)).area() for rank in range(ranks)]
    found = loads_of(layout, CU, dense if window is None else lambda n: ramp(n, window))
    assert found == want
    assert loads_of(layout, torch.tensor(CU), dense) == loads_of(layout, CU, dense)


def test_any_chunks_have_loads():
    layout = Layout(97, (((3, 30), (40, 41), (60, 97)), (), ((0, 3), (30, 40), (41, 60))))
    reach = Reach.documents(CU)
    want = [reach.rows(layout.index(rank)).area() for rank in range(3)]
    assert loads_of(layout, CU, dense) == want and want[1] == 0
    assert imbalance(layout, CU, dense) == max(want) * 3 / sum(want)


def test_the_largest_over_the_mean():
    one = [0, 64]
    assert imbalance(make_layout("zigzag", 64, 4), one, dense) == 1
    # The last quarter of a square triangle is 7 of 16 parts.
    assert imbalance(make_layout("contiguous", 64, 4), one, dense) == pytest.approx(1.75, rel=0.02)
    assert imbalance(make_layout("contiguous", 8, 2), range(9), dense) == 1
    assert imbalance(make_layout("contiguous", 0, 2), [0], dense) == 1
