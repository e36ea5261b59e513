"""Sparse: attention over chosen blocks with Triton kernels.

Two orders, see `Shape.by_row` and `by_row_back`.
Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from ..scoring import Gradients, Scoring
from . import sparse_blocks, sparse_blocks_backward, sparse_rows, sparse_rows_backward
from .sparse_delta import delta_of
from .sparse_keys import keys
from .sparse_shape import BLOCK_OF_A_DOT, Inputs, Shape, dense, nothing_chosen


def forward(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    reach: Reach,
    blocks: Blocks,
    scoring: Scoring,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and natural-log lse [T, H] in fp32; see `attend`."""
    if nothing_chosen(Shape.of(q_THD, k_SGD, v_SGV, blocks)):
        out_THV = q_THD.new_zeros(*q_THD.shape[:2], v_SGV.shape[2], dtype=out_dtype)
        return out_THV, out_THV.new_full(q_THD.shape[:2], float("-inf"), dtype=torch.float32)
    inputs = Inputs.of(q_THD, k_SGD, v_SGV, reach, blocks, scoring)
    if inputs.shape.by_row:
        return sparse_rows.forward(inputs, out_dtype)
    return sparse_blocks.forward(inputs, blocks, out_dtype)


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
    """Gradients in fp32; see `attend_backward`.

    The same in every run, with one exception: over blocks of fewer than 16 keys, dk, dv and the
    gradients of biases are added up by atomics in whatever order, unless
    `torch.are_deterministic_algorithms_enabled()`; then each key gathers its rows, which is slower.
    """
    if nothing_chosen(Shape.of(q_THD, k_SGD, v_SGV, blocks)):
        dq, dk, dv = (_zeros(x) for x in (q_THD, k_SGD, v_SGV))
        return Gradients(dq, dk, dv, dkey_bias_SH=_zeros(scoring.key_bias_SH))
    dout, lse = dense(dout_THV), lse_TH.float().contiguous()
    inputs = Inputs.of(q_THD, k_SGD, v_SGV, reach, blocks, scoring, dout)
    delta = delta_of(dout, dense(out_THV), dlse_TH)
    shape = inputs.shape
    if shape.block < BLOCK_OF_A_DOT and not torch.are_deterministic_algorithms_enabled():
        sums = _zeros(k_SGD), _zeros(v_SGV), _zeros(scoring.key_bias_SH)
        dq = sparse_rows_backward.queries(inputs, dout, lse, delta, sums)
        return Gradients(dq, *sums[:2], dkey_bias_SH=sums[2])
    if shape.by_row_back:
        dq = sparse_rows_backward.queries(inputs, dout, lse, delta, None)
    else:
        dq = sparse_blocks_backward.queries(inputs, blocks, dout, lse, delta)
    dk, dv, dbias = keys(inputs, blocks, dout, lse, delta)
    return Gradients(dq, dk, dv, dkey_bias_SH=dbias)


@overload
def _zeros(x: Tensor) -> Tensor: ...
@overload
def _zeros(x: None) -> None: ...
@overload
def _zeros(x: Tensor | None) -> Tensor | None: ...
def _zeros(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.new_zeros(x.shape, dtype=torch.float32)
