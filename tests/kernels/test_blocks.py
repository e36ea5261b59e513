import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.blocks import Blocks
from longspan.kernels.eager import backend, by_block, by_row
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from support.attention_cases import assert_close_as_naive, draw_case, run_case, twin_case
from support.memory import peak_growth
from support.poison import poisoned


@pytest.fixture(params=["by_block", "by_row"])
def order(request):
    """Both orders of the eager backend, whatever the size of the blocks; small tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "SMALL_BLOCK", 0 if request.param == "by_block" else 10**6)
        patch.setattr(by_block, "MAX_ROWS", 8)
        patch.setattr(by_row, "MAX_GATHERED", 2**9)
        yield


ANY_ORDER = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=120, **ANY_ORDER)
@given(st.integers(0, 10**6))
def test_fp64_equals_the_twin(order, seed):
    case = draw_case(seed, blocks=True)
    with poisoned():
        got, ways = run_case(case)
    for have, want in zip(got, twin_case(case, ways), strict=True):
        torch.testing.assert_close(have, want, atol=1e-10, rtol=1e-10)


@settings(max_examples=40, derandomize=True, **ANY_ORDER)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_errors_are_those_of_the_dtype(order, seed, dtype):
    case = draw_case(seed, blocks=True, dtype=dtype, dims=(16, 16))
    with poisoned():
        got, ways = run_case(case)
    assert_close_as_naive(case, got, ways)


def test_choices_are_sorted_and_distinct():
    grid = Grid.documents([0, 100], 10)
    blocks = Blocks.choose(torch.tensor([[[7, -3, 2, 7, 2, -1]]]), grid)
    assert blocks.ids_QCN.dtype == torch.int32
    assert [x for x in blocks.ids_QCN.flatten().tolist() if x >= 0] == [2, 7]


def test_a_grid_has_its_own_blocks_in_each_document():
    grid = Grid.documents([0, 5, 5, 6, 14], 4)
    assert grid.starts_B1.tolist() == [0, 4, 5, 6, 10, 14]
    assert grid.largest == 4 and len(grid) == 5
    local = grid.keys(torch.tensor([0, 3, 5, 7, 9, 12]))
    assert local.starts_B1.tolist() == [0, 2, 2, 3, 5, 6]


def test_the_span_of_a_row_is_what_its_reach_meets():
    cu = [0, 5, 5, 6, 14]
    grid, reach = Grid.documents(cu, 4), Reach.documents(cu, window=3)
    first, last = grid.span(reach)
    for row in range(14):
        keys = range(int(reach.first_T[row]), int(reach.last_T[row]))
        met = {b for b in range(5) for s in keys if grid.starts_B1[b] <= s < grid.starts_B1[b + 1]}
        assert list(range(int(first[row]), int(last[row]))) == sorted(met), row
    nothing = Grid.documents(cu, 4).span(reach.keys(torch.arange(0)))
    assert bool((nothing[0] >= nothing[1]).all())


def test_the_inverse_lists_who_chose_each_block():
    torch.manual_seed(0)
    grid = Grid.documents([0, 64], 8)
    blocks = Blocks.choose(torch.randint(-1, 8, (64, 2, 3)), grid)
    starts = blocks.inverse.starts_CB1.tolist()
    for head in range(2):
        for block in range(8):
            at = head * 8 + block
            got = blocks.inverse.groups_P[starts[at] : starts[at + 1]].tolist()
            chose = (blocks.ids_QCN[:, head] == block).any(-1)
            assert got == chose.nonzero()[:, 0].tolist()


ROWS, KEYS = torch.randn(4, 4, 8), torch.randn(4, 2, 8)
FOUR = Reach.documents([0, 4])
ONE_BLOCK = Grid.documents([0, 4], 4)


def picked(count, rows=4, grid=ONE_BLOCK):
    return Blocks.choose(torch.zeros(rows, count, 1, dtype=torch.int32), grid)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": ROWS[0]}, r"q \[T, H, D\]"),
        ({"q": ROWS[..., :7]}, "same head dim: q .4, 4, 7."),
        ({"q": ROWS[:, :3]}, "multiple of key-value heads"),
        ({"q": ROWS.bfloat16()}, "one floating-point dtype"),
        ({"q": ROWS.to("meta")}, "one device"),
        ({"v": KEYS[:3]}, "agree in tokens"),
        ({"q": ROWS[:3]}, "3 query rows, but a reach of 4"),
        ({"reach": Reach.documents([0, 3, 4]), "k": KEYS[:3], "v": KEYS[:3]}, "reach up to key 4"),
        ({"blocks": picked(3)}, "3 block heads cannot serve 4 query heads and 2"),
        ({"blocks": picked(2, rows=3)}, "4 query rows, but blocks for 3"),
        ({"blocks": picked(2, grid=Grid.documents([0, 5], 4))}, "4 keys, but a grid of 5"),
        ({"key_bias_SH": torch.zeros(4, 2)}, r"biases must be \[S, H\] = \[4, 4\]"),
        ({"sink_H": torch.zeros(2)}, "one sink per query head: 4"),
        ({"softcap": 0.0}, "soft cap must be above 0"),
    ],
)
def test_what_contradicts_itself_is_refused(change, words):
    call = {"q": ROWS, "k": KEYS, "v": KEYS, "reach": FOUR, "scale": 1.0} | change
    inputs = [call.pop(name) for name in ("q", "k", "v", "reach")]
    with pytest.raises(ValueError, match=words):
        attend(*inputs, **call)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grid.documents([0, 4], 0), "at least 1 key"),
        (lambda: Grid.documents([0, 5, 3], 4), "ascend from 0"),
        (lambda: Reach.documents([0, 5, 3]), "ascend from 0"),
        (lambda: Reach.documents([1, 5]), "ascend from 0"),
        (lambda: Reach.documents([0, 5], 0), "window"),
        (lambda: Blocks.choose(torch.zeros(4, 2), ONE_BLOCK), "integers"),
        (lambda: Blocks.choose(torch.ones(4, 1, 1).int(), ONE_BLOCK, check=True), "block 1 is not"),
        (lambda: Blocks.choose(torch.zeros(4, 1, 1).int(), ONE_BLOCK, [0, 4]), "query groups"),
    ],
)
def test_choices_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_64k_tokens_in_bounded_memory():
    tokens, generator = 2**16, torch.Generator().manual_seed(0)
    reach, grid = Reach.documents([0, tokens]), Grid.documents([0, tokens], 64)
    q, k, v = (torch.randn(tokens, 1, 16, generator=generator) for _ in range(3))
    own = torch.arange(tokens)[:, None, None] // 64
    ids = (torch.rand(tokens, 1, 15, generator=generator) * (own + 1)).long()
    with peak_growth() as grown:
        blocks = Blocks.choose(torch.cat([ids, own], -1), grid)
        out, lse = attend(q, k, v, reach, blocks, scale=0.25)
        grads = attend_backward(out, q, k, v, out, lse, reach, blocks, scale=0.25)
    # One row of scores for each query would be 16 GiB.
    assert grown.mib < 512, grown.mib
    assert all(bool(x.isfinite().all()) for x in (out, lse, *grads[:3]))
