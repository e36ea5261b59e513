from itertools import product

import pytest
import torch
from longspan.kernels.eager.block_scores import BlockScores as Eager
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.kernels.selection_plan import plan
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.triton.block_scores import BlockScores as Triton
from longspan.kernels.windows import Windows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CU = torch.tensor([0, 45, 48, 48, 49, 90, 170])
RULES = [
    SelectionRule(4, initial, local, statistic=statistic, mapping=mapping)
    for statistic, mapping, (initial, local) in product(
        ("probability", "logit"), ("overlap_sum", "overlap_max"), ((0, 0), (1, 2))
    )
]


@pytest.mark.parametrize("span", [1, 5])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.statistic} {r.mapping} {r.local}")
@pytest.mark.parametrize(("window", "size"), [((8, 4), 16), ((4, 4), 3), ((6, 2), 5)], ids=str)
def test_equals_eager(rule, span, window, size):
    draw = torch.Generator().manual_seed(0)
    starts = None if span == 1 else Grid.documents(CU, span).starts_B1
    windows = Windows.documents(CU, *window)
    todo = plan(windows, Grid.documents(CU, size), Reach.documents(CU, 60), starts)
    met = 0
    for chunk in todo.chunks(2, 40, 2**12):
        groups = chunk.groups.stop - chunk.groups.start
        scores = torch.randn(2, groups, len(chunk.sight), generator=draw).to(DEVICE)
        if rule.mapping == "overlap_max":
            scores[torch.rand(scores.shape, generator=draw).to(DEVICE) < 0.05] = float("nan")
        both = (kind(todo, rule, DEVICE, torch.float32) for kind in (Eager, Triton))
        want, got = (of_blocks(chunk, scores.clone()) for of_blocks in both)
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6, equal_nan=True)
        met += want.numel()
    assert met > 300
