import pytest
import torch
from longspan.attention.rope import RotaryTable, inverse_frequencies
from longspan.attention.settings import RopeSettings
from longspan.errors import LongspanError
from reference.rope import naive_rope


@pytest.mark.parametrize("base", [10_000.0, 5e6])
@pytest.mark.parametrize("dim", [2, 6, 64])
def test_equals_complex_numbers(dim, base):
    torch.manual_seed(0)
    x, positions = torch.randn(40, 3, dim), torch.randint(0, 3000, (40,))
    table = RotaryTable.build(positions, RopeSettings(base=base), dim)
    want = naive_rope(x, positions, base).float()
    # fp32 frequencies are off by 6e-8, times 3000 tokens.
    torch.testing.assert_close(table.apply(x), want, atol=5e-4, rtol=0)
    near = RotaryTable.build(positions % 8, RopeSettings(base=base), dim)
    want = naive_rope(x, positions % 8, base).float()
    torch.testing.assert_close(near.apply(x), want, atol=3e-6, rtol=0)


def test_angles_stay_exact_at_a_million_tokens():
    positions = torch.tensor([2**20 - 1])
    table = RotaryTable.build(positions, RopeSettings(), 16)
    turns = inverse_frequencies(RopeSettings(), 16).double()
    want = (positions.double() * turns).repeat(2)[None]
    torch.testing.assert_close(table.cos_TD, want.cos().float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(table.sin_TD, want.sin().float(), atol=1e-7, rtol=0)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(query, key):
        near, far = (
            RotaryTable.build(torch.tensor([at]), RopeSettings(), 32) for at in (query, key)
        )
        return (near.apply(q) * far.apply(k)).sum()

    torch.testing.assert_close(score(50, 20), score(1030, 1000), atol=1e-4, rtol=0)
    assert not torch.isclose(score(50, 20), score(20, 50), atol=1e-2)


def test_gradient_is_the_opposite_turn():
    torch.manual_seed(0)
    table = RotaryTable.build(torch.arange(7) * 11, RopeSettings(), 6)
    x = torch.randn(7, 2, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(table.apply, (x,))
    torch.autograd.gradgradcheck(table.apply, (x,))


def test_bf16_is_rounded_once():
    torch.manual_seed(0)
    table = RotaryTable.build(torch.arange(100), RopeSettings(), 16)
    x = torch.randn(100, 2, 16).bfloat16().requires_grad_()
    out = table.apply(x)
    assert torch.equal(out, table.apply(x.detach().float()).bfloat16())
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_strided_heads():
    torch.manual_seed(0)
    table = RotaryTable.build(torch.arange(9), RopeSettings(), 4)
    fused = torch.randn(9, 5, 4)
    assert torch.equal(table.apply(fused[:, 1:3]), table.apply(fused[:, 1:3].clone()))


def test_an_odd_head_dim_is_refused():
    with pytest.raises(LongspanError, match="head dim is 7"):
        inverse_frequencies(RopeSettings(), 7)
