"""FlashAttention-2 as built into PyTorch: packed documents, windows, rectangles.

Shapes: T query rows, S keys, H query heads, G key-value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from ..request import Request
from ..scoring import Gradients, Scoring
from .shape import Shape, seen_whole, served, why_not

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


def refuses(request: Request) -> str | None:
    """Why this backend cannot serve a request; None if it can."""
    return why_not(request, largest_dim=256)


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    reach: Reach,
    blocks: Blocks | None,
    scoring: Scoring,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and lse [T, H]; see `attend`."""
    del blocks
    shape = served(reach)
    k, v = shape.seen(k_SGD), shape.seen(v_SGD)
    sequences, how = _call(shape, q_THD.device), _options(shape, scoring)
    out_THD, lse_HT, *_ = _flash(q_THD, k, v, *sequences, 0.0, shape.causal, False, **how)
    return out_THD.to(out_dtype), lse_HT.T.contiguous()


def backward(
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    dlse_TH: Tensor | None,
    reach: Reach,
    blocks: Blocks | None,
    scoring: Scoring,
) -> Gradients:
    """Gradients in fp32, accumulated so by the kernel and rounded once; see `attend_backward`."""
    del blocks, dlse_TH
    shape, dtype = served(reach), q_THD.dtype
    unused = torch.zeros(2, dtype=torch.uint64, device=q_THD.device)  # the state of dropout
    grads = _flash_backward(
        dout_THD.to(dtype), q_THD, shape.seen(k_SGD), shape.seen(v_SGD), out_THD.to(dtype),
        lse_TH.T.contiguous(), *_call(shape, q_THD.device), 0.0, shape.causal, unused, unused,
        **_options(shape, scoring),
    )  # fmt: skip
    dq, dk, dv = (grad.float() for grad in grads)
    return Gradients(dq, seen_whole(dk, k_SGD, shape), seen_whole(dv, v_SGD, shape))


def _call(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    longest = shape.longest(shape.queries), shape.longest(shape.keys)
    return (shape.cu_queries.on(device), shape.cu_keys.on(device), *longest)


def _options(shape: Shape, scoring: Scoring) -> dict[str, float | int]:
    if shape.window is None:
        return {"scale": scoring.scale}
    return {"scale": scoring.scale, "window_size_left": shape.window - 1, "window_size_right": 0}
