import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.reach import Reach
from longspan.kernels.triton.row_ranges import NEVER, PLAN_KEYS, row_ranges


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_ranges_are_the_tightest(data):
    keys = data.draw(st.integers(1, 12 * PLAN_KEYS))
    rows = data.draw(st.integers(0, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    first, last = torch.randint(0, keys + 1, (2, rows), generator=generator)
    ascending = data.draw(st.booleans())
    if ascending:
        first, last = first.sort().values, last.sort().values
    plan = row_ranges(Reach(first, last), keys).on(torch.device("cpu"))
    ordered = bool((first.diff() >= 0).all() and (last.diff() >= 0).all())
    assert plan.shape == (4, -(-keys // PLAN_KEYS))
    for tile, (low, high, core_low, core_high) in enumerate(plan.T.tolist()):
        begin, end = tile * PLAN_KEYS, min(keys, (tile + 1) * PLAN_KEYS)
        meets = (torch.maximum(first, torch.tensor(begin)) < last.clamp(max=end)).tolist()
        covers = ((first <= begin) & (last >= end)).tolist()
        met = [row for row in range(rows) if meets[row]]
        assert (low, high) == ((met[0], met[-1] + 1) if met else (NEVER, 0))
        core = [row for row in range(rows) if covers[row]] if ordered else []
        assert list(range(core_low, core_high)) == core


def test_a_million_rows_are_planned_quickly_and_once():
    reach = Reach.documents([0, 1_000_000])
    plan = row_ranges(reach, 1_000_000)
    assert row_ranges(reach, 1_000_000) is plan
    low_J, high_J, core_low_J, core_high_J = plan.on(torch.device("cpu"))
    begin_J = torch.arange(0, 1_000_000, PLAN_KEYS)
    assert torch.equal(low_J.long(), begin_J) and bool((high_J == 1_000_000).all())
    assert torch.equal(core_low_J.long(), begin_J + PLAN_KEYS - 1)
    assert bool((core_high_J == 1_000_000).all())
