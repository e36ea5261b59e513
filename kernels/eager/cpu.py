"""Attention of one piece on a CPU: the flash-attention operator that ships with PyTorch.

It knows neither soft cap nor biases.

Shapes: T query rows, S keys, H query heads, G key-value heads (H is a multiple of G), D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

# It serves grouped queries without expanding keys or values. It wants equal head dims, aligns
# causal masks to the top left, and calls the lse of a fully masked row 0: pieces avoid all three.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    *,
    causal: bool,
    mask_TS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and natural-log lse [T, H] of one piece.

    Args:
        q_THD: Queries, fp32 or fp64.
        k_SGD: Keys.
        v_SGD: Values, of the same head dim.
        causal: Row i sees the keys up to i.
        mask_TS: Added to the scores: 0 where visible, -inf elsewhere; every row sees a key.
        scale: Of the scores.
    """
    out_HTD, lse_HT = _flash(
        _heads_first(q_THD),
        _heads_first(k_SGD),
        _heads_first(v_SGD),
        0.0,
        causal,
        attn_mask=mask_TS,
        scale=scale,
    )
    return out_HTD[0].transpose(0, 1), lse_HT[0].transpose(0, 1)


def backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    *,
    causal: bool,
    mask_TS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [T, H, D], dk and dv [S, G, D], given output and lse over all keys."""
    dq, dk, dv = _flash_backward(
        _heads_first(dout_THD),
        _heads_first(q_THD),
        _heads_first(k_SGD),
        _heads_first(v_SGD),
        _heads_first(out_THD),
        _heads_first(lse_TH),
        0.0,
        causal,
        attn_mask=mask_TS,
        scale=scale,
    )
    return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)
