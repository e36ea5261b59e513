"""Merge: launches merge.cu.

Shapes: R rows, N partial results of each, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .program import Program

_KERNELS = {
    torch.float32: "merge_fp32",
    torch.bfloat16: "merge_bf16",
    torch.float16: "merge_fp16",
}
_PIECE_BYTES = 16
_WARPS = 4


def fits(parts_RNV: Tensor) -> bool:
    """Whether the kernel can merge them: its dtypes, and rows of whole 16-byte pieces."""
    whole = parts_RNV.shape[-1] * parts_RNV.element_size() % _PIECE_BYTES == 0
    return parts_RNV.dtype in _KERNELS and whole


def merge_parts(parts_RNV: Tensor, lse_RN: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.merge.merge_parts` on a GPU, for what `fits`."""
    rows, parts, width = parts_RNV.shape
    parts_RNV = parts_RNV.contiguous()
    if parts_RNV.data_ptr() % _PIECE_BYTES:
        parts_RNV = parts_RNV.clone()
    lse_RN = lse_RN.float().contiguous()
    out_RV = parts_RNV.new_empty((rows, width))
    lse_R = lse_RN.new_empty(rows)
    Program("merge.cu").launch(
        _KERNELS[parts_RNV.dtype],
        (-(-rows // _WARPS),),
        32 * _WARPS,
        *(parts_RNV, lse_RN, out_RV, lse_R),
        *(rows, parts, width * parts_RNV.element_size() // _PIECE_BYTES),
    )
    return out_RV, lse_R
