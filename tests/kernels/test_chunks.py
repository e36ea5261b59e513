import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.chunks import SMALL, WASTE, plan_chunks
from longspan.kernels.query_groups import QueryGroups
from longspan.kernels.reach import Reach


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 3000), max_size=6),
    st.none() | st.integers(1, 2000),
    st.sampled_from([1, 5000, 2**22]),
    st.none() | st.integers(1, 500),
    st.integers(0, 99),
)
def test_chunks_hold_all_that_is_seen_and_little_else(lengths, window, pairs, width, seed):
    reach = Reach.documents(torch.tensor([0, *lengths]).cumsum(0), window)
    generator = torch.Generator().manual_seed(seed)
    # Rows that see nothing, as padding has it.
    nothing = torch.rand(len(reach), generator=generator) < seed / 200
    first_T, last_T = (x.masked_fill(nothing, 0) for x in (reach.first_T, reach.last_T))
    sizes_T, at = last_T - first_T, 0
    for chunk in plan_chunks(Reach(first_T, last_T), pairs, width):
        assert at <= chunk.start < chunk.stop and not bool(sizes_T[at : chunk.start].any())
        at = chunk.stop
        seen = sizes_T[chunk.rows] > 0
        # No row that sees nothing stretches the range.
        assert int(first_T[chunk.rows][seen].min()) == chunk.first
        assert int(last_T[chunk.rows][seen].max()) == chunk.last
        rows, keys = chunk.stop - chunk.start, chunk.last - chunk.first
        if rows > 1:
            assert rows * (min(keys, width) if width else keys) <= pairs
            assert rows * keys <= max(SMALL, WASTE * int(sizes_T[chunk.rows].sum()))
    assert not bool(sizes_T[at:].any())


def test_a_group_sees_what_its_rows_see():
    reach = Reach(torch.tensor([0, 9, 4, 3, 7, 8]), torch.tensor([0, 3, 6, 9, 7, 9]))
    groups = QueryGroups(torch.tensor([0, 2, 2, 4, 6]))
    both = groups.reach(reach)
    assert both.first_T.tolist() == [0, 0, 3, 8] and both.last_T.tolist() == [0, 0, 9, 9]
