import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.top import top_ids


def by_definition(row: list[float], count: int) -> list[int]:
    order = sorted(range(len(row)), key=lambda number: (-row[number], number))
    chosen = sorted(number for number in order[:count] if row[number] > float("-inf"))
    return chosen + [-1] * (count - len(chosen))


# Few distinct values, so that ties are the rule.
VALUES = st.sampled_from([float("-inf"), -2.5, -0.0, 0.0, 1e-42, 3.0, float("inf")])


@settings(deadline=None)
@given(
    st.integers(0, 12).flatmap(
        lambda x: st.lists(st.lists(VALUES, min_size=x, max_size=x), min_size=1, max_size=4)
    ),
    st.integers(0, 14),
)
def test_the_largest_and_of_equal_ones_the_lowest(rows, count):
    got = top_ids(torch.tensor(rows, dtype=torch.float32).reshape(len(rows), -1), count)
    assert got.dtype == torch.int32
    assert got.tolist() == [by_definition(row, count) for row in rows]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_any_floats(count):
    scores = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    assert top_ids(scores, count).tolist() == [by_definition(r, count) for r in scores.tolist()]


def test_nan_of_either_sign_is_above_all():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[inf, -nan, 1.0, nan, -inf, inf], [0.0, -inf, -1.0, -nan, 2.0, 1.0]])
    assert scores[0, 1].signbit() and not scores[0, 3].signbit()
    assert top_ids(scores, 3).tolist() == [[0, 1, 3], [3, 4, 5]]
    assert top_ids(scores, 6)[1].tolist() == [0, 2, 3, 4, 5, -1]
