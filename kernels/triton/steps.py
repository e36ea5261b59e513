"""Steps: what the attention kernels have in common, inside of them.

Logits are scores times log2(e), so that exp2 of them are weights.

Shapes: M query rows and N keys of a tile, V value dim.
"""

# pyright: basic
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc):
    """`acc` + a @ b; fp32 inputs are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b):
    """The same from zero."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """Within 2 ulp everywhere; libdevice, which has one too, is not there in the interpreter."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2E)))
    # Near 0 that cancels; there five terms of Lambert's continued fraction are exact in fp32.
    square = tl.minimum(x * x, 0.25)
    over = 945.0 + square * (105.0 + square)
    under = 945.0 + square * (420.0 + square * 15.0)
    return tl.where(size < 0.5, x * (over / under), tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(products, scale, softcap, CAP: tl.constexpr):
    """Products of queries and keys as logits, without biases."""
    if CAP:
        return (softcap * LOG2E) * tanh(products * (scale / softcap))
    return products * (scale * LOG2E)


@triton.jit
def slope_of(logits, softcap):
    """Derivative of the cap, from what `logits_of` gave."""
    bent = logits * (1.0 / (softcap * LOG2E))
    return 1.0 - bent * bent


@triton.jit
def absorb(acc_MV, sum_M, peak_M, logits_MN, unit, v_NV, SAFE: tl.constexpr):
    """One step of an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).

    Args:
        acc_MV: Weighted sum of the values so far, times exp2(-peak); fp32, like the others.
        sum_M: Sum of the weights so far, times the same.
        peak_M: Largest logit so far, -inf before the first.
        logits_MN: Of this tile, divided by `unit`; -inf where a row does not see a key.
        unit: Positive; spares a multiplication where the scale is all that there is to a score.
        v_NV: Values; no NaN where no row sees the key.
        SAFE: Whether a row may have -inf for all it met so far.
    """
    new_M = tl.maximum(peak_M, tl.max(logits_MN, 1) * unit)
    level_M = new_M
    if SAFE:
        level_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    weights_MN = tl.exp2(logits_MN * unit - level_M[:, None])
    fade_M = tl.exp2(peak_M - level_M)
    sum_M = sum_M * fade_M + tl.sum(weights_MN, 1)
    acc_MV = dot(weights_MN.to(v_NV.dtype), v_NV, acc_MV * fade_M[:, None])
    return acc_MV, sum_M, new_M


@triton.jit
def finish(acc_MV, sum_M, peak_M):
    """Output and natural-log lse of an online softmax: 0 and -inf where nothing was seen."""
    nothing_M = sum_M == 0.0
    sum_M = tl.where(nothing_M, 1.0, sum_M)
    lse_M = tl.where(nothing_M, float("-inf"), (peak_M + tl.log2(sum_M)) * LN2)
    return acc_MV / sum_M[:, None], lse_M
