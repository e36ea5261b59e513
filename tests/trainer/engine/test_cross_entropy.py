"""The chunked output layer and loss against float64, alone and over a split vocabulary."""

import pytest
import torch
from longspan.trainer.engine import cross_entropy
from longspan.trainer.engine.cross_entropy import linear_cross_entropy
from support.world import World

TOKENS, WIDTH, VOCAB = 41, 12, 30


def case(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(32, WIDTH, generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=random)
    weights = (torch.rand(TOKENS, generator=random) > 0.2).float()
    return hidden, weight, labels, weights


def naive(hidden, weight, labels, weights):
    """Weighted loss sum, losses and gradients in float64."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    losses = torch.nn.functional.cross_entropy(hidden @ weight[:VOCAB].T, labels, reduction="none")
    total = (losses * weights).sum()
    (3 * total).backward()
    return total.item(), losses.detach(), hidden.grad, weight.grad


def ours(hidden, weight, labels, weights, first=0, valid=VOCAB, group=None):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    total, losses = linear_cross_entropy(
        hidden, weight, labels, weights, first=first, valid=valid, group=group
    )
    (3 * total).backward()
    return total.item(), losses, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_bytes", [1, 2**25])
def test_equals_the_twin_in_every_chunking(monkeypatch, chunk_bytes):
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", chunk_bytes)
    expected, found = naive(*case()), ours(*case())
    assert abs(found[0] - expected[0]) < 1e-4
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()
    assert not found[3][VOCAB:].any(), "padding rows have no gradient"


def test_bf16_accumulates_the_weight_gradient_in_fp32():
    inputs = case(torch.bfloat16)
    expected, found = naive(*inputs), ours(*inputs)
    assert found[2].dtype == found[3].dtype == torch.bfloat16
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def split(rank_rows: int):
    """This rank's loss and gradients with `rank_rows` rows of the vocabulary each."""
    import torch.distributed as dist

    hidden, weight, labels, weights = case()
    first = dist.get_rank() * rank_rows
    padded = torch.cat([weight, torch.zeros(2 * rank_rows - len(weight), WIDTH)])
    mine = padded[first : first + rank_rows]
    valid = max(0, min(rank_rows, VOCAB - first))
    return ours(hidden, mine, labels, weights, first, valid, dist.group.WORLD)


@pytest.mark.parametrize("rank_rows", [16, 32])
def test_a_split_vocabulary_gives_the_same(worlds, rank_rows):
    """With 32 rows each, the second rank holds nothing but padding."""
    world: World = worlds(2)
    expected = naive(*case())
    parts = world.run(split, rank_rows)
    for total, losses, _, _ in parts:
        assert abs(total - expected[0]) < 1e-4
        assert (losses - expected[1]).norm() < 1e-6 * expected[1].norm()
    d_hidden = parts[0][2] + parts[1][2]
    d_weight = torch.cat([part[3] for part in parts])[:VOCAB]
    assert (d_hidden - expected[2]).norm() < 1e-6 * expected[2].norm()
    assert (d_weight - expected[3][:VOCAB]).norm() < 1e-6 * expected[3].norm()
