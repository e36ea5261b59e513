import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.alignment import align
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.blocks import Blocks
from longspan.kernels.eager import dense, plain
from longspan.kernels.grid import Grid
from longspan.kernels.merge import merge
from longspan.kernels.pool import pool
from longspan.kernels.reach import Reach
from longspan.kernels.selection import select_blocks
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.windows import Windows
from reference.attention import naive_attend, naive_gradients
from reference.visibility import visible_in
from support.memory import peak_growth
from torch.utils._python_dispatch import TorchDispatchMode

SCALE = 0.3
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(params=["cpu", "plain"])
def kernel(request, monkeypatch):
    """Both kernels run on a CPU; the plain one with tiles small enough that it loops."""
    if request.param == "plain":
        monkeypatch.setattr(plain, "MAX_SCORES", 2**10)
        monkeypatch.setattr(dense, "uses_flash", lambda *_: False)


def draw(reach, keys, heads=(4, 2), dims=(5, 5), dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    rows = len(reach)
    q = torch.randn(rows, heads[0], dims[0], dtype=dtype)
    k = torch.randn(keys, heads[1], dims[0], dtype=dtype)
    return q, k, torch.randn(keys, heads[1], dims[1], dtype=dtype)


def assert_equals_the_twin(reach, keys, tolerance, with_dlse=True, **shape):
    q, k, v = draw(reach, keys, **shape)
    bounds = (visible_in(reach.first_T, reach.last_T, keys), SCALE)
    out, lse = attend(q, k, v, reach, scale=SCALE)
    assert out.is_contiguous() and out.dtype == q.dtype
    want_out, want_lse = naive_attend(q, k, v, *bounds)
    torch.testing.assert_close(out.double(), want_out, **tolerance)
    torch.testing.assert_close(lse.double(), want_lse, **tolerance)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse) if with_dlse else None
    grads = attend_backward(dout, q, k, v, out, lse, reach, scale=SCALE, dlse_TH=dlse)[:3]
    wants = naive_gradients(dout, q, k, v, *bounds, dlse)
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad.double(), want, **tolerance)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("cu", [[0, 100], [0, 1, 2, 3, 50, 51, 160], [0, 7]])
def test_fp64_is_exact(kernel, cu, window, with_dlse):
    reach = Reach.documents(cu, window)
    for heads, dims in [((4, 2), (5, 5)), ((3, 3), (6, 2)), ((4, 1), (3, 8))]:
        assert_equals_the_twin(reach, cu[-1], EXACT, with_dlse, heads=heads, dims=dims)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_over_any_keys_in_fp64(data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    keep = data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    keys = (torch.rand(total, generator=generator) < keep).nonzero()[:, 0]
    rows = torch.randperm(total, generator=generator)[: data.draw(st.integers(0, total))]
    if data.draw(st.booleans()):
        rows = rows.sort().values
    reach = Reach.documents(cu, data.draw(st.none() | st.integers(1, 50)))
    group = data.draw(st.integers(1, 2))
    heads = (group * data.draw(st.integers(1, 3)), group)
    dims = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    assert_equals_the_twin(reach.rows(rows).keys(keys), len(keys), EXACT, heads=heads, dims=dims)


@pytest.mark.parametrize("window", [None, 70])
def test_fp32_is_close(kernel, window):
    reach = Reach.documents([0, 300, 301, 400], window)
    assert_equals_the_twin(
        reach, 400, {"atol": 2e-5, "rtol": 2e-5}, dtype=torch.float32, dims=(16, 16)
    )


def test_a_window_wider_than_the_kernels_key_blocks():
    # Whole key blocks of a tile are then masked for some of its rows.
    assert_equals_the_twin(Reach.documents([0, 1500], 700), 1500, EXACT, heads=(1, 1), dims=(4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing(kernel, dtype):
    reach = Reach.documents([0, 40, 80]).keys(torch.arange(50, 80))
    q, k, v = draw(reach, 30, dtype=dtype)
    out, lse = attend(q, k, v, reach, scale=SCALE)
    assert bool((out[:50] == 0).all()) and bool((lse[:50] == float("-inf")).all())
    assert bool(lse[50:].isfinite().all())
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    grads = attend_backward(dout, q, k, v, out, lse, reach, scale=SCALE, dlse_TH=dlse)[:3]
    assert all(bool(grad.isfinite().all()) and grad.dtype == lse.dtype for grad in grads)
    assert bool((grads[0][:50] == 0).all())


def test_no_keys_at_all():
    reach = Reach.documents([0, 8]).keys(torch.arange(0))
    q, k, v = draw(reach, 0)
    out, lse = attend(q, k, v, reach, scale=SCALE)
    dq, dk, dv, *_ = attend_backward(out, q, k, v, out, lse, reach, scale=SCALE)
    assert not bool(out.any()) and not bool(dq.any()) and dk.shape == k.shape == dv.shape


def test_strided_and_expanded_inputs():
    reach = Reach.documents([0, 33, 90])
    fused = torch.randn(90, 3, 2, 8, dtype=torch.float64)
    q, k, v = fused.unbind(1)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = attend(q, k, v, reach, scale=SCALE)
    bounds = (visible_in(reach.first_T, reach.last_T, 90), SCALE)
    torch.testing.assert_close(out, naive_attend(q, k, v, *bounds)[0])
    dout = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(out)
    got = attend_backward(dout, q, k, v, out, lse, reach, scale=SCALE)[:3]
    wants = naive_gradients(dout, q, k, v, *bounds)
    for grad, want in zip(got, wants, strict=True):
        torch.testing.assert_close(grad, want, **EXACT)


def bf16_errors(reach, keys):
    """Largest error of output and gradients against fp64, relative to the largest entry."""
    q, k, v = draw(reach, keys, heads=(4, 2), dims=(16, 16), dtype=torch.bfloat16)
    bounds = (visible_in(reach.first_T, reach.last_T, keys), SCALE)
    out, lse = attend(q, k, v, reach, scale=SCALE)
    dout = torch.randn_like(out)
    grads = attend_backward(dout, q, k, v, out, lse, reach, scale=SCALE)[:3]
    got = (out, *(grad.bfloat16() for grad in grads))
    wants = (naive_attend(q, k, v, *bounds)[0], *naive_gradients(dout, q, k, v, *bounds))
    return [
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, wants, strict=True)
    ]


def test_many_pieces_lose_no_more_bf16_than_one_piece():
    one = Reach.documents([0, 512])
    torch.manual_seed(3)
    seen = torch.maximum(one.last_T - 400, torch.zeros(512, dtype=torch.int64))
    many = Reach(seen + (torch.arange(512) % 7 == 0), one.last_T)
    assert len(one.pieces) == 1 and len(many.pieces) > 3
    for single, several in zip(bf16_errors(one, 512), bf16_errors(many, 512), strict=True):
        assert several <= 1.5 * max(single, 2**-8), (single, several)


def halves(reach, keys):
    index = torch.randperm(keys, generator=torch.Generator().manual_seed(5))
    return [part.sort().values for part in (index[: keys // 3], index[keys // 3 :])]


def test_two_shards_merge_to_the_whole_and_their_backwards_add_up():
    reach = Reach.documents([0, 30, 31, 90])
    q, k, v = draw(reach, 90)
    parts = [(reach.keys(index), index) for index in halves(reach, 90)]
    results = [attend(q, k[index], v[index], local, scale=SCALE) for local, index in parts]
    out, lse = merge(*results[0], *results[1])
    bounds = (visible_in(reach.first_T, reach.last_T, 90), SCALE)
    want_out, want_lse = naive_attend(q, k, v, *bounds)
    torch.testing.assert_close(out, want_out, **EXACT)
    torch.testing.assert_close(lse, want_lse, **EXACT)
    dout = torch.randn_like(out)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for local, index in parts:
        grads = attend_backward(dout, q, k[index], v[index], out, lse, local, scale=SCALE)
        dq += grads[0]
        dk[index], dv[index] = grads[1], grads[2]
    wants = naive_gradients(dout, q, k, v, *bounds)
    for grad, want in zip((dq, dk, dv), wants, strict=True):
        torch.testing.assert_close(grad, want, **EXACT)


def test_merge_is_exact_where_a_side_saw_nothing():
    out, other = torch.randn(4, 2, 3), torch.zeros(4, 2, 3)
    lse, nothing = torch.randn(4, 2), torch.full((4, 2), float("-inf"))
    for merged in (merge(out, lse, other, nothing), merge(other, nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    both = merge(other, nothing, other, nothing)
    assert torch.equal(both[0], other) and torch.equal(both[1], nothing)


class Operators(TorchDispatchMode):
    """The operators called that are more than another view of a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.is_view is False:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_document_is_one_operator_each_way():
    reach = Reach.documents([0, 64])
    q, k, v = draw(reach, 64, dtype=torch.float32)
    assert len(reach.pieces) == 1 and reach.stop == 64  # planned once, before
    with Operators() as forward:
        out, lse = attend(q, k, v, reach, scale=SCALE)
    with Operators() as backward:
        attend_backward(out, q, k, v, out, lse, reach, scale=SCALE)
    assert forward.names == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert backward.names == ["_scaled_dot_product_flash_attention_for_cpu_backward"]


def test_64k_tokens_in_bounded_memory():
    tokens = 2**16
    reach = Reach.documents([0, 20_000, 20_001, tokens], 256)
    q, k, v = draw(reach, tokens, heads=(1, 1), dims=(16, 16), dtype=torch.float32)
    with peak_growth() as grown:
        out, lse = attend(q, k, v, reach, scale=SCALE)
        grads = attend_backward(out, q, k, v, out, lse, reach, scale=SCALE)[:3]
    # One row of 64K x 64K scores in fp32 for 1024 queries alone would be 256 MiB.
    assert grown.mib < 200, grown.mib
    assert all(bool(x.isfinite().all()) for x in (out, lse, *grads))
    last = slice(tokens - 300, tokens)
    near = Reach.documents([0, tokens - 20_001], 256).rows(torch.arange(tokens - 20_001)[-300:])
    visible = visible_in(near.first_T, near.last_T, tokens - 20_001)
    want, _ = naive_attend(q[last], k[20_001:], v[20_001:], visible, SCALE)
    torch.testing.assert_close(out[last].double(), want, atol=1e-5, rtol=1e-5)


def test_leaves_are_not_recorded_and_gradients_are_those_of_detached_ones():
    """Inputs that require gradients, as in a model: nothing here is differentiable by itself."""
    reach, grid = Reach.documents([0, 9]), Grid.documents([0, 9], 4)
    ids = torch.arange(9)[:, None, None] // 4
    tensors = [torch.randn(9, n, 4, requires_grad=True) for n in (2, 1, 1)]
    for blocks in (None, Blocks.choose(ids, grid)):
        out, lse = attend(*tensors, reach, blocks, scale=SCALE)
        assert not out.requires_grad and not lse.requires_grad
        grads = attend_backward(out, *tensors, out, lse, reach, blocks, scale=SCALE)
        detached = [x.detach() for x in tensors]
        wants = attend_backward(out, *detached, out, lse, reach, blocks, scale=SCALE)
        for grad, want in zip(grads[:3], wants[:3], strict=True):
            assert torch.equal(grad, want) and not grad.requires_grad


def test_other_functions_do_not_record_either():
    cu, leaf = [0, 9], torch.randn(9, 2, 4, requires_grad=True)
    windows, grid, reach = Windows.documents(cu, 4, 2), Grid.documents(cu, 4), Reach.documents(cu)
    pooled = pool(leaf, windows, "mean")
    assert not pooled.requires_grad
    select_blocks(leaf, pooled, windows, grid, reach, SelectionRule(2), scale=SCALE)
    assert not any(x.requires_grad for x in align(leaf, leaf * 2, torch.ones(9)))
