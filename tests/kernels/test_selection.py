from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels import backends, selection_plan
from longspan.kernels.eager import pooled_scores
from longspan.kernels.grid import Grid
from longspan.kernels.pool import pool
from longspan.kernels.pooled import Pooled
from longspan.kernels.reach import Reach
from longspan.kernels.selection import select_blocks
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.windows import Windows
from reference.pooling import windows_of
from reference.selection import naive_choice, naive_lse
from support.memory import peak_growth

SCALE = 0.4
NSA = SelectionRule(4, initial=1, local=2)
INFLLM = SelectionRule(2, initial=1, local=2, count_forced=False, mapping="overlap_max")
MOBA = SelectionRule(3, statistic="logit", heads="none", mapping="overlap_max")
RULES = [
    NSA, INFLLM, MOBA,
    SelectionRule(3, local=0), SelectionRule(2, heads="max"), SelectionRule(9, heads="none"),
    SelectionRule(3, initial=2, local=0, statistic="logit", heads="max"),
    SelectionRule(3, statistic="logit", heads="max", mapping="overlap_max"),
    SelectionRule(3, statistic="logit", mapping="overlap_max"),
    SelectionRule(3, statistic="logit"),
]  # fmt: skip


class Case:
    """Packed documents with queries, pooled keys, and all that a choice depends on."""

    def __init__(self, lengths, size=(8, 4), block=16, heads=(4, 2), window=None, tail=False,
                 seed=0, dtype=torch.float64):  # fmt: skip
        torch.manual_seed(seed)
        self.lengths, self.size, self.tail = lengths, size, tail
        self.cu = torch.tensor([0, *lengths]).cumsum(0)
        total = int(self.cu[-1])
        self.windows = Windows.documents(self.cu, *size, tail=tail)
        self.grid = Grid.documents(self.cu, block)
        self.reach = Reach.documents(self.cu, window)
        self.q = torch.randn(total, heads[0], 5, dtype=dtype)
        self.keys = torch.randn(total, heads[1], 5, dtype=dtype)

    @property
    def k(self):
        return pool(self.keys, self.windows, "mean")

    def choose(self, rule, **options):
        inputs = self.q, self.k, self.windows, self.grid, self.reach, rule
        return select_blocks(*inputs, scale=SCALE, **options)

    def lists(self, rule, **options):
        ids = self.choose(rule, **options).ids_QCN
        assert ids.dtype == torch.int32 and ids.shape[2] == rule.total
        return [[[b for b in row if b >= 0] for row in heads] for heads in ids.tolist()]

    def wanted(self, rule, groups=None, lse=None):
        rows = list(zip(self.reach.first_T.tolist(), self.reach.last_T.tolist(), strict=True))
        pairs = windows_of(self.lengths, *self.size, self.tail)
        heads, kv_heads = self.q.shape[1], self.keys.shape[1]
        share = heads // kv_heads
        if lse is None:
            lse = naive_lse(self.q, self.k, pairs, rows, SCALE)
        groups = pairwise(range(len(self.q) + 1) if groups is None else groups)
        choosers = [[h] for h in range(heads)] if rule.heads == "none" else [
            list(range(g * share, (g + 1) * share)) for g in range(kv_heads)]  # fmt: skip
        common = pairs, self.grid.starts_B1.tolist(), rows
        return [
            [naive_choice(self.q, self.k, *common, group, rule, SCALE, lse, self.size[1],
                          c[0] // share, c) for c in choosers]
            for group in groups
        ]  # fmt: skip


@pytest.fixture(params=[None, 300], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(pooled_scores, "MAX_SCORES_CPU", request.param)
        monkeypatch.setattr(pooled_scores.Scorer, "rows", 23)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_twin(rule, chunks):
    case = Case([100, 0, 5, 1, 70])
    assert case.lists(rule) == case.wanted(rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_windows_that_are_the_blocks(rule):
    case = Case([50, 3, 81], size=(16, 16), heads=(3, 1), tail=rule.local == 1)
    assert case.lists(rule) == case.wanted(rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("step", [1, 8, 11])
def test_query_groups_choose_together(rule, step, chunks):
    case = Case([64, 2, 40], heads=(2, 2), block=8)
    groups = [*range(0, 106, step), 106]
    starts = torch.tensor(groups)
    wide = SelectionRule(**{**vars(rule), "count": rule.count + 4})
    assert case.lists(wide, query_starts=starts) == case.wanted(wide, groups)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_documents_rows_and_rules(data):
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=4))
    length = data.draw(st.integers(1, 12))
    size = length, data.draw(st.integers(1, length))
    groups = data.draw(st.integers(1, 2))
    heads = groups * data.draw(st.integers(1, 3)), groups
    case = Case(lengths, size, data.draw(st.integers(1, 20)), heads,
                data.draw(st.none() | st.integers(1, 30)), data.draw(st.booleans()))  # fmt: skip
    rule = SelectionRule(
        data.draw(st.integers(3, 6)), data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2)),
        data.draw(st.booleans()), data.draw(st.sampled_from(["probability", "logit"])),
        data.draw(st.sampled_from(["sum", "max", "none"])),
        data.draw(st.sampled_from(["overlap_sum", "overlap_max"])),
    )  # fmt: skip
    rows = torch.randperm(len(case.q), generator=torch.Generator().manual_seed(3))
    rows = rows[: data.draw(st.integers(0, len(rows)))]
    case.q, case.reach = case.q[rows], case.reach.rows(rows)
    assert case.lists(rule) == case.wanted(rule)


def test_the_weights_of_equation_9():
    # Windows of 32 and 16, blocks of 64: block j has 1, 2, 2, 2, 1 of windows 4 j - 1 to 4 j + 3.
    windows, grid = Windows.documents([0, 256], 32, 16), Grid.documents([0, 256], 64)
    plan = selection_plan.SelectionPlan.of(windows, grid, Reach.documents([0, 256]), None)
    at_KB, keys_KB = (mirror.on(torch.device("cpu")) for mirror in plan.overlaps)
    of_blocks = [
        {int(p): int(n) // 16 for p, n in zip(at_KB[:, b], keys_KB[:, b], strict=True) if n}
        for b in range(4)
    ]
    assert of_blocks == [
        {0: 2, 1: 2, 2: 2, 3: 1}, {3: 1, 4: 2, 5: 2, 6: 2, 7: 1},
        {7: 1, 8: 2, 9: 2, 10: 2, 11: 1}, {11: 1, 12: 2, 13: 2, 14: 2},
    ]  # fmt: skip


def test_forced_blocks_come_first_and_count_or_not():
    case = Case([16 * 12])
    counted, more = case.lists(NSA), case.lists(INFLLM)
    for row in range(16 * 12):
        own = row // 16
        forced = {0, own, max(0, own - 1)}
        for head in range(2):
            assert forced <= set(counted[row][head]) and forced <= set(more[row][head])
            assert len(counted[row][head]) == min(4, own + 1)
            assert len(more[row][head]) == min(5, own + 1)


def test_equal_scores_choose_the_lowest():
    case = Case([160])
    case.keys = torch.ones_like(case.keys)
    rule = SelectionRule(3, mapping="overlap_max")
    assert case.lists(rule)[-1] == [[0, 1, 9]] * 2


def test_before_the_first_window_forced_blocks_then_the_lowest():
    case = Case([7], size=(8, 4), block=1)
    assert case.lists(SelectionRule(3, local=2))[6] == [[0, 5, 6]] * 2
    assert case.lists(SelectionRule(2, local=1, statistic="logit"))[6] == [[0, 6]] * 2
    assert case.lists(SelectionRule(3, local=2))[0] == [[0]] * 2


def test_each_head_by_itself():
    case = Case([160])
    together, alone = case.lists(NSA), case.lists(SelectionRule(4, 1, 2, heads="none"))
    assert len(together[-1]) == 2 and len(alone[-1]) == 4
    assert any(row[0] != row[1] for row in alone)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_choice_knows_other_documents_or_later_tokens(rule):
    case = Case([90, 40, 60], block=8)
    before = case.choose(rule).ids_QCN
    for token in (100, 0, 70, 189):
        kept = case.q[token].clone(), case.keys[token].clone()
        case.q[token], case.keys[token] = 50.0, -70.0
        after = case.choose(rule).ids_QCN
        stop = int(case.cu[case.cu > token][0])
        affected = torch.zeros(190, dtype=torch.bool)
        affected[token:stop] = True
        assert torch.equal(after[~affected], before[~affected]), token
        case.q[token], case.keys[token] = kept
    assert not torch.equal(Case([90, 40, 60], block=8, seed=1).choose(rule).ids_QCN, before)


@pytest.mark.parametrize("rule", [NSA, INFLLM, SelectionRule(3, heads="none")], ids=str)
def test_a_known_lse_changes_nothing(rule, chunks):
    case = Case([100, 5, 70])
    rows = list(zip(case.reach.first_T.tolist(), case.reach.last_T.tolist(), strict=True))
    lse = naive_lse(case.q, case.k, windows_of(case.lengths, 8, 4, False), rows, SCALE)
    assert case.lists(rule, lse_TH=lse) == case.wanted(rule)
    # It is used: heads count for more where the normaliser given is smaller.
    lse[:, 0] -= 9.0
    assert case.lists(rule, lse_TH=lse) == case.wanted(rule, lse=lse)
    assert rule.heads == "none" or case.wanted(rule, lse=lse) != case.wanted(rule)


@pytest.mark.parametrize("rule", [NSA, INFLLM], ids=str)
def test_the_lse_of_coarser_keys(rule, chunks):
    case = Case([150, 20, 70], block=2)
    coarse = Windows.documents(case.cu, 32, 16)
    keys = pool(case.keys, coarse, "mean") * 3.0
    rows = list(zip(case.reach.first_T.tolist(), case.reach.last_T.tolist(), strict=True))
    far = naive_lse(case.q, keys, windows_of(case.lengths, 32, 16, False), rows, SCALE)
    exact = naive_lse(case.q, case.k, windows_of(case.lengths, 8, 4, False), rows, SCALE)
    lse = torch.where(far.isinf(), exact, far)
    got = case.lists(rule, coarse=Pooled(keys, coarse))
    assert got == case.wanted(rule, lse=lse) and got != case.wanted(rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_chooses_nearly_the_same(dtype):
    case = Case([200, 17], dtype=dtype)
    agree = sum(got == want for got, want in zip(case.lists(NSA), case.wanted(NSA), strict=True))
    # Scores are in fp32 from the same inputs: only near-ties may differ.
    assert agree >= 215, agree


def test_64k_tokens_in_bounded_memory():
    tokens = 2**16
    torch.manual_seed(0)
    q, k = torch.randn(tokens, 1, 16), torch.randn(tokens, 1, 16)
    windows, grid = Windows.documents([0, tokens], 32, 16), Grid.documents([0, tokens], 64)
    reach, pooled = Reach.documents([0, tokens]), pool(k, windows, "mean")
    with peak_growth() as grown:
        blocks = select_blocks(q, pooled, windows, grid, reach, SelectionRule(16, 1, 2), scale=0.25)
    # All scores of windows would be 1 GiB, those of blocks 256 MiB.
    assert grown.mib < 128, grown.mib
    assert bool((blocks.ids_QCN[-1] >= 0).all())


@pytest.mark.parametrize("by_triton", [False, True])
def test_a_share_that_overflows_does_not_push_out_what_is_forced(by_triton):
    """An approximate lse may be far below a score: its share is infinite, like what is forced."""
    keys = torch.tensor([20.0, -20.0]).repeat_interleave(16).repeat(16)[:, None, None]
    windows, coarse = Windows.documents([0, 512], 16, 16), Windows.documents([0, 512], 128, 64)
    q, reach = torch.full((512, 1, 1), 20.0), Reach.documents([0, 512])
    inputs = q, pool(keys, windows, "mean"), windows, Grid.documents([0, 512], 64), reach
    far = Pooled(pool(keys, coarse, "mean"), coarse)
    with backends.use("triton" if by_triton else "eager"):
        blocks = select_blocks(*inputs, SelectionRule(4, 1, 1), scale=0.25, coarse=far)
    assert blocks.ids_QCN[-1, 0].tolist() == [0, 1, 2, 7]


def test_logits_of_a_group_whose_rows_are_not_neighbours_are_refused():
    cu, some = [0, 32, 64, 96], torch.tensor([14, 15, 94, 95])
    windows, grid = Windows.documents(cu, 8, 8), Grid.documents(cu, 8)
    reach = Reach.documents(cu).rows(some)
    inputs = torch.randn(4, 1, 4), torch.randn(len(windows), 1, 4), windows, grid, reach
    starts = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="not neighbours"):
        select_blocks(
            *inputs, SelectionRule(8, local=0, statistic="logit"), scale=1.0, query_starts=starts
        )
    select_blocks(*inputs, SelectionRule(8, local=0), scale=1.0, query_starts=starts)
    pairs = torch.tensor([0, 2, 4])
    select_blocks(
        *inputs, SelectionRule(8, local=0, statistic="logit"), scale=1.0, query_starts=pairs
    )


def test_mistakes_are_named():
    case = Case([60])
    inputs = case.q, case.k, case.windows, case.grid, case.reach
    mistakes = [
        ((case.q[1:], *inputs[1:]), {}, "reach of 60"),
        ((case.q[..., 1:], *inputs[1:]), {}, "wants q"),
        ((case.q[:, :3], *inputs[1:]), {}, "multiple"),
        ((case.q.float(), *inputs[1:]), {}, "dtype"),
        ((*inputs[:3], Grid.documents([0, 59], 16), case.reach), {}, "windows over 60"),
        (inputs, {"lse_TH": case.q}, "lse must be"),
        (inputs, {"query_starts": torch.tensor([0, 61])}, "query groups"),
        (inputs, {"query_starts": torch.tensor([0, 60]).int()}, "int64"),
        ((*inputs[:4], Reach(torch.zeros(60).long(), torch.full((60,), 61))), {}, "reach up to 61"),
    ]
    for arguments, options, match in mistakes:
        with pytest.raises(ValueError, match=match):
            select_blocks(*arguments, NSA, scale=SCALE, **options)
    with pytest.raises(ValueError, match="logits take neither"):
        case.choose(MOBA, lse_TH=case.q[..., 0])
    with pytest.raises(ValueError, match="forces 4"):
        case.choose(SelectionRule(2), query_starts=torch.tensor([0, 60]))
    for wrong in ({"count": 2, "initial": 1, "local": 2}, {"count": 0, "local": 0},
                  {"count": 1, "heads": "mean"}, {"count": -1, "count_forced": False}):  # fmt: skip
        with pytest.raises(ValueError, match=r"choose|chosen|one of"):
            SelectionRule(**wrong)
