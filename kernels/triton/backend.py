"""The Triton backend: our own kernels, on a GPU, or on a CPU in Triton's interpreter.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from ..request import Request
from ..scoring import Gradients, Scoring
from . import dense_backward, dense_forward, sparse
from .tuning import INTERPRETED

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_DIM = 256
"""Above, the accumulators of a tile do not fit into registers."""


def refuses(request: Request) -> str | None:
    """Why this backend cannot serve a request; None if it can."""
    if request.device.type == "cpu" and not INTERPRETED:
        return "on a CPU it needs Triton's interpreter (TRITON_INTERPRET=1 at the start)"
    if request.device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, not on {request.device.type}"
    if request.dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not in {request.dtype}"
    largest = max(request.dim, request.value_dim)
    if largest > LARGEST_DIM:
        return f"it takes head dims up to {LARGEST_DIM}, not {largest}"
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
    with torch.cuda.device_of(q_THD):
        if blocks is None:
            return dense_forward.forward(q_THD, k_SGD, v_SGV, reach, scoring, out_dtype)
        return sparse.forward(q_THD, k_SGD, v_SGV, reach, blocks, scoring, out_dtype)


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
    """Gradients in fp32; see `attend_backward`."""
    inputs = dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, dlse_TH, reach
    with torch.cuda.device_of(q_THD):
        if blocks is None:
            return dense_backward.backward(*inputs, scoring)
        return sparse.backward(*inputs, blocks, scoring)
