"""cuDNN's attention through PyTorch: one causal document, or all of some keys.

Shapes: T query rows, S keys, H query heads, G key-value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from ..request import Request
from ..scoring import Gradients, Scoring
from .shape import seen_whole, served, shape_of, why_not

_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
_attention_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def refuses(request: Request) -> str | None:
    """Why this backend cannot serve a request; None if it can."""
    reason = why_not(request, largest_dim=128)
    if reason is not None:
        return reason
    shape = shape_of(request.reach)
    if shape is None or len(shape.queries) != 2 or shape.window is not None:
        return "it serves one document at a time, without a window"
    return None


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
    inputs = (_heads_first(x) for x in (q_THD, shape.seen(k_SGD), shape.seen(v_SGD)))
    out_1HTD, lse, *_ = _attention(*inputs, None, True, is_causal=shape.causal, scale=scoring.scale)
    # Some releases give the lse a last dim of 1.
    lse_HT = lse.reshape(q_THD.shape[1], len(q_THD))
    return out_1HTD[0].transpose(0, 1).to(out_dtype).contiguous(), lse_HT.T.contiguous()


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
    k, v = shape.seen(k_SGD), shape.seen(v_SGD)
    tensors = (_heads_first(x.to(dtype)) for x in (dout_THD, q_THD, k, v, out_THD))
    lse_1HT1 = lse_TH.T.contiguous()[None, :, :, None]
    unused = torch.zeros((), dtype=torch.int64, device=q_THD.device)  # the state of dropout
    grads = _attention_backward(
        *tensors, lse_1HT1, unused, unused, None, None, None, len(q_THD), len(k), 0.0,
        shape.causal, scale=scoring.scale,
    )  # fmt: skip
    dq, dk, dv = (grad[0].transpose(0, 1).float() for grad in grads)
    return Gradients(dq, seen_whole(dk, k_SGD, shape), seen_whole(dv, v_SGD, shape))


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)
