"""Delta: what softmax gradients subtract from the gradient of every score of a row.

Shapes: T query rows, H query heads, V value dim.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse_steps import load_rows


def delta_of(dout_THV: Tensor, out_THV: Tensor, dlse_TH: Tensor | None) -> Tensor:
    """dout . out - dlse, [T, H] in fp32.

    Args:
        dout_THV: Gradient of the output, its last dim dense.
        out_THV: Output, its last dim dense.
        dlse_TH: Gradient of the lse; None for zero.
    """
    tokens, heads, size = out_THV.shape
    delta = torch.empty(tokens, heads, dtype=torch.float32, device=out_THV.device)
    if not tokens:
        return delta
    dlse = delta if dlse_TH is None else dlse_TH.float().contiguous()
    padded, rows = triton.next_power_of_2(size), 32
    _delta[(triton.cdiv(tokens * heads, rows),)](
        dout_THV, out_THV, dlse, delta, tokens, *dout_THV.stride()[:2], *out_THV.stride()[:2],
        H=heads, V=size, VP=padded, WITH_DLSE=dlse_TH is not None, TILE=rows,
    )  # fmt: skip
    return delta


@triton.jit
def _delta(
    dout, out, dlse, delta, tokens, dt, dh, ot, oh,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, WITH_DLSE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    token_M, head_M = row_M // H, row_M % H
    live_M = token_M < tokens
    dout_MV = load_rows(dout, token_M * dt + head_M * dh, live_M, V, VP).to(tl.float32)
    out_MV = load_rows(out, token_M * ot + head_M * oh, live_M, V, VP).to(tl.float32)
    delta_M = tl.sum(dout_MV * out_MV, 1)
    if WITH_DLSE:
        delta_M -= tl.load(dlse + row_M, mask=live_M, other=0.0)
    tl.store(delta + row_M, delta_M, mask=live_M)
