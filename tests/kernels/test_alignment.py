import pytest
import torch
from longspan.kernels.alignment import align
from reference.alignment import naive_align
from support.accuracy import assert_as_good_as
from support.memory import peak_growth


@pytest.fixture(autouse=True)
def poison():
    """What was never written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(rows, heads=3, dim=5, dtype=torch.float64):
    torch.manual_seed(rows)
    a, b = (torch.randn(rows, heads, dim, dtype=dtype) for _ in "ab")
    weight = torch.rand(rows)
    weight[::3] = 0
    return a, b, weight


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("elements", [1, 60, 2**21])
def test_loss_and_gradients(beta, rows, elements):
    a, b, weight = draw(rows)
    got = align(a, b, weight, beta=beta, elements=elements)
    for x, want in zip(got, naive_align(a, b, weight, beta), strict=True):
        torch.testing.assert_close(x, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loses_no_more_than_the_same_in_its_dtype(dtype):
    a, b, weight = draw(300, dtype=dtype)
    got, wants = align(a, b, weight), naive_align(a, b, weight, 1.0)
    same = naive_align(a, b, weight, 1.0, dtype)
    assert (
        got.total.dtype == torch.float32 and got.da_THV.dtype == got.db_THV.dtype == torch.float32
    )
    for x, want, naive in zip(got, wants, same, strict=True):
        assert_as_good_as(naive, x, want)


def test_gradients_in_fp16_do_not_underflow():
    a, b, weight = draw(5, dtype=torch.float16)
    weight /= 2**16
    got, wants = align(a, b, weight), naive_align(a, b, weight, 1.0)
    for x, want in zip(got[1:], wants[1:], strict=True):
        torch.testing.assert_close(x.double(), want.double(), atol=0, rtol=1e-3)


def test_tensor_ranks_add_up():
    a, b, weight = draw(11, heads=4)
    whole = align(a, b, weight)
    parts = [align(a[:, h], b[:, h], weight, width=20) for h in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    torch.testing.assert_close(torch.cat([part.da_THV for part in parts], 1), whole.da_THV)


def test_padding_weighs_nothing_whatever_is_in_it():
    a, b, weight = draw(12)
    whole = align(a, b, weight)
    a[3], b[6] = 1e30, -7.0
    other = align(a, b, weight)
    assert torch.equal(whole.total, other.total)
    assert torch.equal(whole.da_THV, other.da_THV) and torch.equal(whole.db_THV, other.db_THV)
    assert not bool(other.da_THV[weight == 0].any())


def test_bounded_memory():
    a, b = (torch.ones(2**16, 8, 64, dtype=torch.bfloat16) for _ in "ab")
    with peak_growth() as grown:
        got = align(a, b, torch.ones(2**16))
    # The gradients are 256 MiB; each temporary of the whole in fp32 would be 128 MiB more.
    assert grown.mib < 380, grown.mib
    assert float(got.total) == 0


def test_shapes_that_contradict_each_other():
    a, b, weight = draw(4)
    with pytest.raises(ValueError, match="two outputs"):
        align(a, b[:3], weight)
    with pytest.raises(ValueError, match="two outputs"):
        align(a, b, weight[:3])
    with pytest.raises(ValueError, match="beta"):
        align(a, b, weight, beta=-1.0)
