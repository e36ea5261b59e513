"""KL losses never hold a map of the sequence, whatever its blocks are like."""

import pytest
import torch
from longspan.kernels.attend import attend
from longspan.kernels.attention_map import AttentionMap
from longspan.kernels.blocks import Blocks
from longspan.kernels.gate import Gate
from longspan.kernels.grid import Grid
from longspan.kernels.index_selection import select_tokens
from longspan.kernels.indexer import Index
from longspan.kernels.map_loss import gate_loss, index_loss
from longspan.kernels.reach import Reach
from longspan.kernels.scoring import Scoring
from support.grid import sample
from support.memory import peak_growth


def test_blocks_of_unequal_size_in_bounded_memory():
    """Short documents beside a long one: every block has the places of the largest."""
    cu = [*range(257), 4352]
    reach, grid, tokens = Reach.documents(cu), Grid.documents(cu, 1024), 4352
    torch.manual_seed(0)
    q, k = torch.randn(tokens, 1, 16), torch.randn(tokens, 1, 16)
    target = AttentionMap(q, k, attend(q, k, k, reach, scale=0.25)[1], Scoring(0.25))
    index = Index(torch.randn(tokens, 1, 1, 16), torch.randn(tokens, 1, 16), None, 0.25)
    with peak_growth() as grown:
        got, _ = index_loss(target, index, reach, grid, torch.ones(tokens))
    assert grown.mib < 512, grown.mib
    assert float(got.weight) == tokens - 256 - 1024


LOSSES = ["index over choices", "index over a grid", "gate over a grid"]


@pytest.mark.parametrize("loss", sample("losses of 64K tokens", LOSSES, 1))
def test_64k_tokens_in_bounded_memory(loss):
    tokens = 2**16
    torch.manual_seed(0)
    q, k = torch.randn(tokens, 1, 16), torch.randn(tokens, 1, 16)
    reach, grid = Reach.documents([0, tokens]), Grid.documents([0, tokens], 64)
    lse = attend(q, k, k, reach, scale=0.25)[1]
    target = AttentionMap(q, k, lse, Scoring(0.25))
    index = Index(torch.randn(tokens, 1, 1, 16), torch.randn(tokens, 1, 16), None, 0.25)
    gate = Gate(torch.randn(tokens, 1, 16), torch.randn(len(grid), 1, 16), 0.25)
    own_T11 = (torch.arange(tokens) // 64)[:, None, None]
    random = (torch.rand(tokens, 1, 15) * (own_T11 + 1)).long()
    chosen = Blocks.choose(torch.cat([random, own_T11], -1), grid)
    # A map of blocks would be 256 MiB, of keys 16 GiB.
    compute = {
        "index over choices": lambda: index_loss(target, index, reach, chosen, torch.ones(tokens)),
        "index over a grid": lambda: index_loss(target, index, reach, grid, torch.ones(tokens)),
        "gate over a grid": lambda: gate_loss(target, gate, reach, grid, torch.ones(tokens)),
    }
    with peak_growth() as grown:
        found, _ = compute[loss]()
    assert grown.mib < 512, grown.mib
    assert float(found.weight) > tokens - 200 and bool((found.rows_TC >= -1e-4).all())


def test_16k_tokens_in_bounded_memory():
    tokens = 2**14
    cu = [0, 3000, 3001, 9000, tokens]
    reach, grid = Reach.documents(cu), Grid.documents(cu, 1)
    torch.manual_seed(0)
    q, k, v = torch.randn(tokens, 2, 16), torch.randn(tokens, 1, 16), torch.randn(1)
    lse = attend(q, k, v.expand(tokens, 1, 16), reach, scale=0.25)[1]
    target = AttentionMap(q, k, lse, Scoring(0.25))
    index = Index(torch.randn(tokens, 1, 2, 16), torch.randn(tokens, 1, 16), None, 0.25)
    weight = torch.ones(tokens)
    with peak_growth() as grown:
        dense, _ = index_loss(target, index, reach, grid, weight)
        over = select_tokens(index, reach, 64)
        sparse, _ = index_loss(target, index, reach, over, weight)
    assert grown.mib < 512, grown.mib
    assert float(dense.weight) == float(sparse.weight) == tokens - 4
    assert bool((dense.rows_TC >= -1e-4).all())
