import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.pool import pool, pool_backward
from longspan.kernels.windows import Windows
from reference.pooling import naive_pool, windows_of

EXACT = {"atol": 1e-12, "rtol": 1e-12}
HOWS = ["mean", "max", "min", "weighted"]
CASES = [
    ([37], 8, 4), ([3, 0, 8, 1, 29], 8, 4), ([16, 20], 4, 4), ([13, 30], 7, 3), ([5, 2], 1, 1),
    ([3, 2], 8, 4), ([40], 8, 1), ([], 4, 2),
]  # fmt: skip


def draw(lengths, length, stride, tail, values="any", dtype=torch.float64):
    torch.manual_seed(len(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    windows = Windows.documents(cu, length, stride, tail=tail)
    shape = sum(lengths), 2, 3
    # Few values: ties are the rule.
    x = torch.randint(-1, 2, shape).to(dtype) if values == "few" else torch.randn(shape).to(dtype)
    return x, windows, torch.randn(2, length).to(dtype), windows_of(lengths, length, stride, tail)


def assert_equals_the_twin(case, how, values, tail):
    x, windows, weight, pairs = draw(*case, tail, values)
    given_weight = weight if how == "weighted" else None
    got = pool(x, windows, how, given_weight)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.enable_grad():
        want = naive_pool(leaves[0], pairs, how, leaves[1])
    torch.testing.assert_close(got, want.detach(), **EXACT)
    dpooled = torch.randn_like(got)
    dx, dweight = pool_backward(dpooled, x, windows, how, given_weight)
    wants = torch.autograd.grad((want * dpooled).sum(), leaves, allow_unused=True) if pairs else (
        None, None)  # fmt: skip
    torch.testing.assert_close(dx, torch.zeros_like(x) if wants[0] is None else wants[0], **EXACT)
    if how == "weighted":
        want_weight = torch.zeros_like(weight) if wants[1] is None else wants[1]
        torch.testing.assert_close(dweight, want_weight, **EXACT)
    else:
        assert dweight is None


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("values", ["any", "few"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fixed_documents(case, how, values, tail):
    assert_equals_the_twin(case, how, values, tail)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 50), max_size=4), st.integers(1, 12), st.integers(1, 12),
    st.booleans(), st.sampled_from(HOWS),
)  # fmt: skip
def test_any_documents(lengths, length, stride, tail, how):
    assert_equals_the_twin((lengths, length, min(stride, length)), how, "few", tail)


@pytest.mark.parametrize("how", HOWS)
def test_bf16_is_summed_in_fp32(how):
    x, windows, weight, pairs = draw([500, 77], 32, 16, True, dtype=torch.bfloat16)
    given_weight = weight if how == "weighted" else None
    got = pool(x, windows, how, given_weight)
    want = naive_pool(x, pairs, how, weight)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), atol=1e-6, rtol=2**-8)
    dx, dweight = pool_backward(got, x, windows, how, given_weight)
    assert dx.dtype == torch.float32 and (dweight is None or dweight.dtype == torch.float32)


@pytest.mark.parametrize("how", HOWS)
def test_nothing_leaks_out_of_a_window(how):
    x, windows, weight, _ = draw([9, 30], 8, 4, True)
    x[8] = float("nan")
    got = pool(x, windows, how, weight if how == "weighted" else None)
    # Key 8 is in the first document's tail window alone.
    assert got.isnan().flatten(1).any(1).nonzero()[:, 0].tolist() == [1]


def test_a_gradient_is_the_same_every_time():
    x, windows, _, _ = draw([3000], 32, 16, False, dtype=torch.float32)
    dpooled = torch.randn(len(windows), 2, 3)
    for how in ("mean", "max"):
        once, again = (pool_backward(dpooled, x, windows, how)[0] for _ in range(2))
        assert torch.equal(once, again)


def test_mistakes_are_named():
    x, windows, weight, _ = draw([20], 8, 4, False)
    for arguments in ((x[1:], windows, "mean"), (x, windows, "mean", weight),
                      (x, windows, "weighted"), (x, windows, "weighted", weight[:, 1:]),
                      (x, windows, "median")):  # fmt: skip
        with pytest.raises(ValueError, match="pool"):
            pool(*arguments)
    with pytest.raises(ValueError, match="gradient of"):
        pool_backward(x, x, windows, "mean")
