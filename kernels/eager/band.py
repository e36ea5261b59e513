"""Band: chosen blocks of which every row has its own and some before it, on a CPU.

Those are next to each other, so that no row needs to be gathered for them: they are a reach of
their own, for which there is a fused operator. The rest goes block by block, merged by lse.
Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim; C block
heads, N blocks per choice.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..blocks import Blocks
from ..grid import Grid
from ..merge import merge
from ..reach import Reach
from ..scoring import Gradients, Scoring
from . import by_block, dense

# Blocks of a band; to look for more takes longer than it saves.
MOST = 32


def forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach, blocks: Blocks, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H], both in the dtype of the accumulators."""
    count = _band(q_THD, reach, blocks, scoring)
    if not count:
        return by_block.forward(q_THD, k_SGD, v_SGV, reach, blocks, scoring)
    near, far = _split(reach, blocks.grid, count)
    parts = (
        *dense.forward(q_THD, k_SGD, v_SGV, near, scoring),
        *by_block.forward(q_THD, k_SGD, v_SGV, far, blocks, scoring),
    )
    return merge(*parts)


def backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    reach: Reach,
    blocks: Blocks,
    scoring: Scoring,
) -> Gradients:
    """Gradients in the dtype of the accumulators; see `attend_backward`."""
    inputs = dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, dlse_TH
    count = _band(q_THD, reach, blocks, scoring)
    if not count:
        return by_block.backward(*inputs, reach, blocks, scoring)
    near, far = _split(reach, blocks.grid, count)
    # Both parts know the output and the lse over all keys, so that their gradients add up.
    found = by_block.backward(*inputs, far, blocks, scoring)
    more = dense.backward(*inputs, near, scoring)
    for total, part in zip(found[:3], more[:3], strict=True):
        total += part
    return found


def _band(q_THD: Tensor, reach: Reach, blocks: Blocks, scoring: Scoring) -> int:
    """How many blocks, from their own backwards, all rows and heads have chosen."""
    if blocks.query_starts is not None or not dense.uses_flash(q_THD, scoring) or reach.empty:
        return 0
    first_T, stop_T = blocks.grid.span(reach)
    at_T11 = (stop_T - 1)[:, None, None]
    count, ids_TCN = 0, blocks.ids_QCN
    while count < MOST:
        there_T = at_T11[:, 0, 0] >= first_T
        chosen_TC = (ids_TCN == at_T11).any(-1)
        if not bool(there_T.any()) or not bool((chosen_TC.all(1) | ~there_T).all()):
            break
        count, at_T11 = count + 1, at_T11 - 1
    return count


@lru_cache(maxsize=4)
def _split(reach: Reach, grid: Grid, count: int) -> tuple[Reach, Reach]:
    """What rows reach within so many of their last blocks, and before; made once for all layers."""
    first_T, stop_T = grid.span(reach)
    block_T = torch.maximum(stop_T - count, first_T).clamp(0, len(grid))
    cut_T = torch.maximum(grid.starts_B1[block_T], reach.first_T)
    cut_T = torch.minimum(cut_T, torch.maximum(reach.last_T, reach.first_T))
    return Reach(cut_T, reach.last_T), Reach(reach.first_T, cut_T)
