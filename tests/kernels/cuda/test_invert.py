import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.blocks import Blocks, Inverse
from longspan.kernels.cuda import invert as module
from longspan.kernels.cuda.invert import fits, invert
from longspan.kernels.grid import Grid


def by_definition(ids_QCN: torch.Tensor, blocks: int) -> tuple[list[int], list[int], list[int]]:
    heads, width = ids_QCN.shape[1:]
    order: list[int] = []
    starts = [0]
    flat = list(enumerate(ids_QCN.flatten().tolist()))
    for head in range(heads):
        for block in range(blocks):
            order += [p for p, id in flat if id == block and p // width % heads == head]
            starts.append(len(order))
    for head in range(heads):
        order += [p for p, id in flat if not 0 <= id < blocks and p // width % heads == head]
    return order, [p // (heads * width) for p in order], starts


@st.composite
def cases(draw):
    """Choices [Q, C, N], duplicates too, and how many blocks there are."""
    queries, heads = draw(st.integers(0, 30)), draw(st.integers(1, 3))
    width, blocks = draw(st.sampled_from([1, 3, 16, 40])), draw(st.sampled_from([0, 1, 7, 8, 30]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(-2, blocks + 3, (queries, heads, width), generator=random)
    return ids.int(), blocks


@pytest.mark.parametrize("per_block", [1, 4])
@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([8, 31]), st.integers(1, 300), st.booleans())
def test_equals_the_definition(shim, per_block, case, size, counts, backwards):
    ids, blocks = case
    shim.defines, shim.backwards = {}, backwards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICES", (size,))
        patch.setattr(module, "_COUNTS", counts)
        patch.setattr(module, "_CHOICES_PER_BLOCK", per_block)
        order, groups, starts = invert(ids, blocks)
    assert order.dtype == groups.dtype == torch.int32
    assert starts.dtype == torch.int64
    got = order.tolist(), groups.tolist(), starts.tolist()
    assert got == by_definition(ids, blocks)


@pytest.mark.parametrize("queries", [0, 1, 700])
def test_equals_the_torch_form(shim, queries):
    shim.defines, shim.backwards = {}, False
    random = torch.Generator().manual_seed(queries)
    ids = torch.randint(-2, 21, (queries, 2, 5), generator=random)
    blocks = Blocks.choose(ids, Grid.documents([0, 330], 16))
    assert len(blocks.grid) == 21
    inverse = Inverse.of(blocks)
    _, groups, starts = invert(blocks.ids_QCN, len(blocks.grid))
    assert torch.equal(groups, inverse.groups_P)
    assert torch.equal(starts, inverse.starts_CB1)


def test_the_work_buffer_is_bounded():
    for queries, heads, width, blocks in [(2**20, 8, 16, 2**14), (2**17, 64, 1, 1), (5, 1, 1, 9)]:
        chunks = -(-queries // module._chunk(queries, heads, width, blocks))
        columns = heads * (blocks + 1)
        assert chunks * columns <= max(module._COUNTS, columns)
        # No more counters than choices, or there would be nothing gained by counting.
        assert (chunks - 1) * columns <= queries * heads * width


def test_what_does_not_fit():
    ids = torch.empty(2**16, 2**14, 1, dtype=torch.int32, device="meta")
    assert fits(ids, 2**14) and not fits(ids, 2**17)
    assert not fits(ids.expand(-1, -1, 2), 4)


def test_heads_as_one_by_a_view(shim):
    """The order within a block is that of positions, whichever head chose it."""
    shim.defines, shim.backwards = {}, False
    ids = torch.randint(-1, 6, (40, 4, 3), generator=torch.Generator().manual_seed(2)).int()
    order, _, starts = invert(ids.reshape(40, 2, 6), 6)
    flat = ids.flatten()
    for head in range(2):
        for block in range(6):
            found = order[starts[head * 6 + block] : starts[head * 6 + block + 1]].long()
            own = (torch.arange(len(flat)) // 6 % 2 == head) & (flat == block)
            assert torch.equal(found, own.nonzero().squeeze(1))
