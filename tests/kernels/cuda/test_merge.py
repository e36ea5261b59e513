import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.cuda.merge import fits
from longspan.kernels.cuda.merge import merge_parts as cuda_merge_parts
from longspan.kernels.merge import merge, merge_parts

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module", params=[merge_parts, cuda_merge_parts], ids=["torch", "cuda"])
def form(request):
    if request.param is cuda_merge_parts:
        request.getfixturevalue("shim").defines = {}
    return request.param


def by_definition(parts_RNV, lse_RN):
    """Weighted mean in float64; parts of lse -inf do not count."""
    lse_RN = lse_RN.double()
    total_R1 = lse_RN.exp().sum(1, keepdim=True)
    weight_RN = torch.where(total_R1 > 0, lse_RN.exp() / total_R1, 0.0)
    parts = parts_RNV.double().nan_to_num(0.0)
    return (weight_RN.unsqueeze(-1) * parts).sum(1), total_R1.squeeze(1).log()


def some_parts(rows, parts, width, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    lse = 3 * torch.randn(rows, parts, generator=random)
    lse[torch.rand(rows, parts, generator=random) < 0.3] = -INF
    lse[: rows // 3] = -INF
    outs = torch.randn(rows, parts, width, generator=random).to(dtype)
    outs[lse == -INF] = NAN  # must not be looked at
    return outs, lse


def rms(values):
    return values.square().mean().sqrt()


def check(form, outs, lse):
    out, total = form(outs, lse)
    exact_out, exact_total = by_definition(outs, lse)
    assert out.dtype == outs.dtype and total.dtype == torch.float32
    # No worse than the exact output rounded once, but for the rounding of fp32 sums.
    rounded = exact_out.to(outs.dtype).double()
    allowed = 1.1 * rms(rounded - exact_out) + 1e-6 * rms(exact_out)
    assert rms(out.double() - exact_out) <= allowed
    torch.testing.assert_close(total.double(), exact_total, rtol=1e-6, atol=1e-6)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 31, 40]),
    st.sampled_from([8, 16, 40, 64, 128, 264]),
    st.integers(0, 2**31),
)
def test_equals_the_definition(form, dtype, rows, parts, width, seed):
    outs, lse = some_parts(rows, parts, width, dtype, seed)
    assert fits(outs)
    check(form, outs, lse)


def test_edges(form):
    nothing = form(torch.full((2, 3, 8), NAN), torch.full((2, 3), -INF))
    assert nothing[0].eq(0).all() and nothing[1].eq(-INF).all()
    outs, lse = some_parts(6, 1, 8, torch.float32, 1)
    seen = lse[:, 0] > -INF
    torch.testing.assert_close(form(outs, lse)[0][seen], outs[seen, 0])
    assert form(outs[:0], lse[:0])[0].shape == (0, 8)
    none = form(torch.zeros(2, 0, 8), torch.zeros(2, 0))
    assert none[0].eq(0).all() and none[1].eq(-INF).all()
    large = torch.tensor([[1e4, 1e4]])  # exp overflows without a shift
    torch.testing.assert_close(form(torch.ones(1, 2, 8), large)[0], torch.ones(1, 8))
    broken = form(torch.ones(1, 2, 8), torch.tensor([[-INF, NAN]]))
    assert broken[0].isnan().all() and broken[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_keep_their_bits(shim, dtype):
    values = [0.0, 1.0, 3.14159, 65504.0, 1e-7, -INF, NAN, 1.00390625]
    outs = torch.tensor(values, dtype=dtype).reshape(1, 1, 8)
    out, _ = cuda_merge_parts(outs, torch.zeros(1, 1))
    torch.testing.assert_close(out, outs[0], rtol=0, atol=0, equal_nan=True)
    # The NaN of a GPU has all bits set, and would become -0.0 where rounding carries.
    nan = torch.full((1, 1), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert cuda_merge_parts(outs, nan)[0].isnan().all()


def test_pairs_merge_as_before():
    outs, lse = some_parts(9, 2, 8, torch.float32, 5)
    outs = outs.nan_to_num(0.0)
    out, total = merge_parts(outs, lse)
    pair = merge(outs[:, :1], lse[:, :1], outs[:, 1:], lse[:, 1:])
    torch.testing.assert_close(out, pair[0][:, 0])
    torch.testing.assert_close(total, pair[1][:, 0])


def test_what_does_not_fit():
    assert not fits(torch.empty(1, 1, 6))
    assert not fits(torch.empty(1, 1, 4, dtype=torch.bfloat16))
    assert not fits(torch.empty(1, 1, 8, dtype=torch.float64))
