"""The eager backend: PyTorch's own operators, on any device, for whatever no other serves.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from ..request import Request
from ..scoring import Gradients, Scoring
from . import by_block, by_row, dense

# Blocks of fewer keys than this are gathered row by row.
SMALL_BLOCK = 8


def refuses(request: Request) -> str | None:
    """Why this backend cannot serve a request: it serves every one."""
    del request
    return None


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    reach: Reach,
    blocks: Blocks | None,
    scoring: Scoring,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H]; see `attend`."""
    if blocks is None:
        out_THV, lse_TH = dense.forward(q_THD, k_SGD, v_SGV, reach, scoring)
    else:
        chosen = by_row if blocks.grid.largest < SMALL_BLOCK else by_block
        out_THV, lse_TH = chosen.forward(q_THD, k_SGD, v_SGV, reach, blocks, scoring)
    return out_THV.to(out_dtype).contiguous(), lse_TH


def backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    reach: Reach,
    blocks: Blocks | None,
    scoring: Scoring,
) -> Gradients:
    """Gradients in the dtype of the accumulators; see `attend_backward`."""
    inputs = dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, dlse_TH, reach
    if blocks is None:
        return dense.backward(*inputs, scoring)
    chosen = by_row if blocks.grid.largest < SMALL_BLOCK else by_block
    return chosen.backward(*inputs, blocks, scoring)
