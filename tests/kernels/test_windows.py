import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.attend import attend
from longspan.kernels.pool import pool
from longspan.kernels.reach import Reach
from longspan.kernels.windows import Windows
from reference.attention import naive_attend
from reference.pooling import windows_of

LENGTHS = st.lists(st.integers(0, 70), min_size=0, max_size=5)
SIZES = st.integers(1, 20).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, length))
)


def cu_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@settings(deadline=None)
@given(LENGTHS, SIZES, st.booleans())
def test_windows_are_those_of_each_document(lengths, size, tail):
    windows = Windows.documents(cu_of(lengths), *size, tail=tail)
    got = list(zip(windows.starts_P.tolist(), windows.stops_P.tolist(), strict=True))
    assert got == windows_of(lengths, *size, tail)
    assert len(windows) == len(got) and windows.keys == sum(lengths)
    assert windows.ragged == any(stop - start < size[0] for start, stop in got)


@settings(deadline=None)
@given(LENGTHS, SIZES, st.booleans(), st.none() | st.integers(1, 40), st.booleans())
def test_a_query_sees_the_windows_wholly_in_its_reach(lengths, size, tail, window, shuffled):
    reach = Reach.documents(cu_of(lengths), window)
    if shuffled:
        reach = reach.rows(torch.randperm(len(reach), generator=torch.Generator().manual_seed(1)))
    seen = Windows.documents(cu_of(lengths), *size, tail=tail).reach(reach)
    all_windows = windows_of(lengths, *size, tail)
    for row in range(len(reach)):
        first, last = int(reach.first_T[row]), int(reach.last_T[row])
        want = [p for p, (a, b) in enumerate(all_windows) if first <= a and b <= last]
        assert list(range(int(seen.first_T[row]), int(seen.last_T[row]))) == want


def test_nsa_sees_a_window_from_its_last_token_on():
    # NSA: key i is visible to query t if t >= 16 i + 31.
    seen = Windows.documents([0, 100], 32, 16).reach(Reach.documents([0, 100]))
    assert seen.last_T.tolist() == [max(0, (t - 15) // 16) for t in range(100)]


def test_a_query_without_keys_sees_no_window():
    seen = Windows.documents([0, 9], 3, 1).reach(Reach(torch.tensor([7, 3]), torch.tensor([2, 3])))
    assert bool((seen.first_T >= seen.last_T).all())


def test_the_compressed_branch():
    cu = [0, 50, 51, 60, 130]
    windows = Windows.documents(cu, 8, 4)
    reach = windows.reach(Reach.documents(cu))
    torch.manual_seed(0)
    q, k, v = (torch.randn(130, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    k, v = pool(k, windows, "mean"), pool(v, windows, "mean")
    out, lse = attend(q, k, v, reach, scale=0.5)
    pairs = list(zip(windows.starts_P.tolist(), windows.stops_P.tolist(), strict=True))
    documents = [range(a, b) for a, b in itertools.pairwise(cu)]
    visible = torch.tensor(
        [[any(t in d and a in d for d in documents) and b <= t + 1 for a, b in pairs]
         for t in range(130)]
    )  # fmt: skip
    want_out, want_lse = naive_attend(q, k, v, visible[None], 0.5)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    assert not bool(out[50:58].any()) and bool(out[58].any())


@pytest.mark.parametrize("arguments", [([0, 9], 4, 5), ([0, 9], 4, 0), ([0, 9], 0, 0),
                                       ([1, 9], 4, 4), ([0, 9, 8], 4, 4)])  # fmt: skip
def test_what_cannot_be_cut_is_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        Windows.documents(*arguments)
