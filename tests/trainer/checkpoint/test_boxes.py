import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from longspan.trainer.checkpoint.boxes import Box, Part, matrix


@st.composite
def parts(draw):
    """A rank's part of a parameter, such as tensor ranks have."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    shape = draw(
        st.sampled_from([(rows, columns), (rows,), (rows, columns, 2), (rows, 1, columns)])
    )
    cuts = sorted(draw(st.sets(st.integers(0, rows), min_size=2, max_size=4)))
    ranges = tuple(itertools.islice(itertools.pairwise(cuts), 0, None, 2))
    width = matrix(shape)[1]
    first = draw(st.integers(0, width - 1))
    return Part(shape, ranges, (first, draw(st.integers(first + 1, width))))


@given(parts(), st.data())
def test_boxes_of_a_range_are_its_elements_in_order(part, data):
    rows, columns = matrix(part.shape)
    full = np.arange(rows * columns).reshape(rows, columns)
    mine = np.concatenate([full[a:b, slice(*part.columns)] for a, b in part.rows]).ravel()
    assert part.size == len(mine)
    first = data.draw(st.integers(0, part.size))
    end = data.draw(st.integers(first, part.size))
    at, count = first, 0
    for box, start in part.boxes(first, end):
        assert start == at
        found = full[box.row : box.row_end, box.column : box.column_end].ravel()
        assert (found == mine[start : start + box.size]).all() and box.size
        at, count = at + box.size, count + 1
    assert at == end
    assert count <= 3 * len(part.rows)


def test_boxes_overlap_where_both_rows_and_columns_do():
    box = Box(2, 5, 0, 4)
    assert box.within(Box(4, 9, 3, 8)) == Box(4, 5, 3, 4)
    assert box.within(Box(5, 9, 0, 4)) is None and box.within(Box(2, 5, 4, 6)) is None
