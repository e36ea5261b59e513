import pytest
import torch
from longspan.attention.rope import NoRotation, RotaryTable, inverse_frequencies
from longspan.attention.settings import RopeSettings
from reference.rope import naive_rope
from support.ropes import SCALINGS, rope
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

PLAIN = RopeSettings()


@pytest.mark.parametrize("base", [10_000.0, 5e6])
@pytest.mark.parametrize("dim", [2, 6, 64])
def test_equals_complex_numbers(dim, base):
    torch.manual_seed(0)
    x, positions = torch.randn(40, 3, dim), torch.randint(0, 3000, (40,))
    settings = RopeSettings(base=base)
    table = RotaryTable.build(positions, settings, dim, 64)
    want = naive_rope(x, positions, settings, 64).float()
    # fp32 frequencies are off by 6e-8, times 3000 tokens.
    torch.testing.assert_close(table.apply(x), want, atol=5e-4, rtol=0)
    near = RotaryTable.build(positions % 8, settings, dim, 64)
    want = naive_rope(x, positions % 8, settings, 64).float()
    torch.testing.assert_close(near.apply(x), want, atol=3e-6, rtol=0)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_output_and_gradient_equal_the_twin(name, share):
    torch.manual_seed(0)
    settings, positions = rope(name, rotary_share=share), torch.arange(9)
    x = torch.randn(9, 2, round(32 / share), requires_grad=True)
    upstream = torch.randn_like(x)
    found = RotaryTable.build(positions, settings, x.shape[-1], 1000).apply(x)
    want = naive_rope(x, positions, settings, 1000)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(y, x, upstream.to(y.dtype))[0] for y in (found, want)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_channels_of_a_part_pair_up_as_in_transformers():
    torch.manual_seed(0)
    settings = rope("yarn", rotary_share=0.5)
    table = RotaryTable.build(torch.arange(20), settings, 64, 1000)
    q, k = torch.randn(20, 4, 64), torch.randn(20, 2, 64)
    want = apply_rotary_pos_emb(q[None], k[None], table.cos_TR[None], table.sin_TR[None], 2)
    for x, expected in zip((q, k), want, strict=True):
        torch.testing.assert_close(table.apply(x), expected[0])
        assert torch.equal(table.apply(x)[..., 32:], x[..., 32:])


def test_angles_stay_exact_at_a_million_tokens():
    positions = torch.tensor([2**20 - 1])
    table = RotaryTable.build(positions, PLAIN, 16, 2**20)
    turns = inverse_frequencies(PLAIN, 16, 2**20).double()
    want = (positions.double() * turns).repeat(2)[None]
    torch.testing.assert_close(table.cos_TR, want.cos().float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(table.sin_TR, want.sin().float(), atol=1e-7, rtol=0)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(query, key):
        near, far = (RotaryTable.build(torch.tensor([at]), PLAIN, 32, 2048) for at in (query, key))
        return (near.apply(q) * far.apply(k)).sum()

    torch.testing.assert_close(score(50, 20), score(1030, 1000), atol=1e-4, rtol=0)
    assert not torch.isclose(score(50, 20), score(20, 50), atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [PLAIN, RopeSettings(rotary_share=0.5), rope("yarn"), rope("yarn", rotary_share=0.75)],
    ids=lambda settings: settings.words,
)
def test_gradient_is_the_opposite_turn(settings):
    torch.manual_seed(0)
    table = RotaryTable.build(torch.arange(7) * 11, settings, 8, 128)
    x = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(table.apply, (x,))
    assert torch.autograd.gradgradcheck(table.apply, (x,))


@pytest.mark.parametrize("settings", [PLAIN, rope("yarn", rotary_share=0.5)])
def test_bf16_is_rounded_once(settings):
    torch.manual_seed(0)
    table = RotaryTable.build(torch.arange(100), settings, 16, 128)
    x = torch.randn(100, 2, 16).bfloat16().requires_grad_()
    out = table.apply(x)
    assert torch.equal(out, table.apply(x.detach().float()).bfloat16())
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_strided_heads():
    torch.manual_seed(0)
    table = RotaryTable.build(torch.arange(9), PLAIN, 4, 16)
    fused = torch.randn(9, 5, 4)
    assert torch.equal(table.apply(fused[:, 1:3]), table.apply(fused[:, 1:3].clone()))


def test_no_rotation_copies_nothing():
    x = torch.randn(9, 5, 4)
    assert NoRotation().apply(x) is x
