"""How uneven layouts are, against the reach of every token."""

import pytest
import torch
from longspan.attention.pairs import dense, ramp
from longspan.kernels.reach import Reach
from longspan.parallel.imbalance import loads_of
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


def test_the_last_quarter_of_a_triangle_is_seven_of_sixteen_parts():
    loads = loads_of(make_layout("contiguous", 64, 4), [0, 64], dense)
    assert loads[-1] / sum(loads) == pytest.approx(7 / 16, rel=0.02)
    assert len(set(loads_of(make_layout("zigzag", 64, 4), [0, 64], dense))) == 1
    assert loads_of(make_layout("contiguous", 0, 2), [0], dense) == [0, 0]
