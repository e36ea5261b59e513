from itertools import product

import pytest
import torch
from longspan.kernels import backends
from longspan.kernels.eager import pooled_scores as eager
from longspan.kernels.grid import Grid
from longspan.kernels.pool import pool
from longspan.kernels.pooled import Pooled
from longspan.kernels.reach import Reach
from longspan.kernels.selection import select_blocks
from longspan.kernels.selection_plan import sight
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.triton import pooled_scores as triton
from longspan.kernels.windows import Windows
from reference.selection import naive_lse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.4
RULES = [
    SelectionRule(4, statistic=statistic, heads=heads)
    for statistic, heads in product(("probability", "logit"), ("sum", "max", "none"))
]


class Case:
    def __init__(self, lengths, heads, dim=5, dtype=torch.float32, window=None):
        generator = torch.Generator().manual_seed(1)
        self.cu = torch.tensor([0, *lengths]).cumsum(0)
        self.windows = Windows.documents(self.cu, 4, 2)
        self.reach = Reach.documents(self.cu, window)
        self.seen = self.windows.reach(self.reach)
        shapes = (len(self.reach), heads[0], dim), (int(self.cu[-1]), heads[1], dim)
        self.q, keys = (torch.randn(x, generator=generator).to(DEVICE, dtype) for x in shapes)
        self.k = pool(keys, self.windows, "mean")
        self.coarse = Windows.documents(self.cu, 16, 8)
        self.coarse_k = pool(keys, self.coarse, "mean")

    def scores(self, module, rows, rule, lse=None, coarse=None, dtype=None):
        q, k, lse, coarse = (
            x if x is None or dtype is None else x.to(dtype)
            for x in (self.q, self.k, lse, coarse)
        )  # fmt: skip
        far = None if coarse is None else (coarse, self.coarse.reach(self.reach))
        scorer = module.Scorer(q, k, self.seen, rule, SCALE, lse, far)
        return scorer(rows, sight(self.seen, rows))


def assert_equals_eager(case, rows, rule, **options):
    got = case.scores(triton, rows, rule, **options)
    want = case.scores(eager, rows, rule, dtype=torch.float64, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.statistic} {rule.heads}")
def test_scores_equal_the_eager_ones(rule, heads):
    case = Case([45, 3, 0, 1, 41], heads)
    for rows in (slice(0, 90), slice(30, 67), slice(46, 47)):
        assert_equals_eager(case, rows, rule)


@pytest.mark.parametrize("dim", [16, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dims_and_dtypes(dim, dtype):
    assert_equals_eager(Case([80], (4, 2), dim, dtype), slice(10, 75), RULES[0])


def test_a_window_over_keys_and_rows_in_any_order():
    case = Case([70, 20], (2, 1), window=30)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    case.q, case.reach = case.q[order.to(DEVICE)], case.reach.rows(order)
    case.seen = case.windows.reach(case.reach)
    for rule in RULES:
        assert_equals_eager(case, slice(0, 90), rule)


def test_a_given_lse_and_that_of_coarser_keys():
    case = Case([70, 9, 41], (4, 2))
    lse = torch.randn(case.q.shape[:2], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for rows in (slice(0, 120), slice(60, 100)):
        assert_equals_eager(case, rows, RULES[0], lse=lse)
        assert_equals_eager(case, rows, RULES[1], coarse=case.coarse_k)


def test_the_lse_equals_the_twin():
    case = Case([70, 3, 60], (4, 2))
    got = triton.pooled_lse(case.q, case.k, case.seen, SCALE).cpu().double()
    rows, pairs = (
        list(zip(a.tolist(), b.tolist(), strict=True))
        for a, b in ((case.reach.first_T, case.reach.last_T),
                     (case.windows.starts_P, case.windows.stops_P))
    )  # fmt: skip
    want = naive_lse(case.q.cpu(), case.k.cpu(), pairs, rows, SCALE)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert bool((got[70:73] == float("-inf")).all())


def test_the_lse_of_a_row_that_sees_nothing_among_rows_that_do():
    case = Case([100], (1, 1))
    sees = torch.arange(100) % 2 == 0
    seen = Reach(torch.zeros(100, dtype=torch.int64), torch.where(sees, 40, 0))
    lse = triton.pooled_lse(case.q, case.k, seen, SCALE)[:, 0].cpu()
    want = (case.q[:, 0] @ case.k[:40, 0].T * SCALE).logsumexp(-1).cpu()
    torch.testing.assert_close(lse, want.masked_fill(~sees, float("-inf")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.statistic} {rule.heads}")
@pytest.mark.parametrize("starts", [None, [0, 30, 31, 60, 100, 120]], ids=["rows", "groups"])
def test_choices_are_the_eager_ones(rule, starts, monkeypatch):
    case = Case([70, 9, 41], (4, 2))
    wide = SelectionRule(**{**vars(rule), "count": 8})
    inputs = case.q, case.k, case.windows, Grid.documents(case.cu, 8), case.reach, wide
    groups = None if starts is None else torch.tensor(starts)
    options = {"scale": SCALE, "query_starts": groups}
    if rule.statistic == "probability":
        options["coarse"] = Pooled(case.coarse_k, case.coarse)
    with backends.use("eager"):
        want = select_blocks(*inputs, **options)
    monkeypatch.setattr(triton, "MAX_SCORES", 1000)
    monkeypatch.setattr(triton.Scorer, "rows", 50)
    got = select_blocks(*inputs, **options)
    # Only near-ties may differ.
    same = (got.ids_QCN == want.ids_QCN).all(-1).double().mean()
    assert same >= 0.98, same


def test_what_it_does_not_serve():
    case = Case([20], (2, 1), dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        case.scores(triton, slice(0, 20), RULES[0])
