"""Steps: what the attention kernels have in common, inside of them.

Logits are scores times log2(e), so that exp2 of them are weights.

Shapes: M query rows and N keys of a tile, V value dim.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from .tuning import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """`acc` + a @ b; fp32 inputs are not rounded to tf32."""
    if WIDEN:  # The interpreter takes the bits of bf16 for integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b):
    """The same from zero."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` in another dtype, rounded to the nearest; the interpreter cuts bf16 off."""
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


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
def within(first, last, key):
    """Whether first <= key < last, by one comparison: what is negative is large without a sign."""
    size = tl.maximum(last - first, 0)
    return (key - first).to(tl.uint32) < size.to(tl.uint32)


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
    acc_MV = dot(narrow(weights_MN, v_NV.dtype), v_NV, acc_MV * fade_M[:, None])
    return acc_MV, sum_M, new_M


@triton.jit
def finish(acc_MV, sum_M, peak_M):
    """Output and natural-log lse of an online softmax: 0 and -inf where nothing was seen."""
    nothing_M = sum_M == 0.0
    sum_M = tl.where(nothing_M, 1.0, sum_M)
    lse_M = tl.where(nothing_M, float("-inf"), (peak_M + tl.log2(sum_M)) * LN2)
    return tl.where(nothing_M[:, None], 0.0, acc_MV / sum_M[:, None]), lse_M


@triton.jit
def load_tile(base, start, stride, stop, ROWS: tl.constexpr, DIM: tl.constexpr,
              BLOCK_DIM: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Rows start to start + ROWS of one head, [ROWS, BLOCK_DIM]; zeros past DIM and past `stop`.

    Args:
        base: Where the head begins.
        start: First row.
        stride: Between rows; elements of a row lie next to each other.
        stop: One past the last row that exists.
        ROWS: Rows of the tile.
        DIM: Elements of a row.
        BLOCK_DIM: The same, up to a power of two.
        EDGE: Whether the tile may reach past `stop`.
    """
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    # Only the tile's start can be far enough away for 64 bits.
    at = base + start.to(tl.int64) * stride + row[:, None] * stride + dim[None, :]
    if EDGE and DIM != BLOCK_DIM:
        return tl.load(at, mask=(row < stop - start)[:, None] & (dim < DIM)[None, :], other=0.0)
    if EDGE:
        return tl.load(at, mask=(row < stop - start)[:, None], other=0.0)
    if DIM != BLOCK_DIM:
        return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(base, start, stride, stop, x, ROWS: tl.constexpr, DIM: tl.constexpr,
               BLOCK_DIM: tl.constexpr):  # fmt: skip
    """The reverse of `load_tile`, always up to `stop` only."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    at = base + start.to(tl.int64) * stride + row[:, None] * stride + dim[None, :]
    inside = (row < stop - start)[:, None] & (dim < DIM)[None, :]
    tl.store(at, narrow(x, base.dtype.element_ty), mask=inside)


@triton.jit
def key_range(first_M, last_M):
    """Hull and core of the rows' intervals: keys that some row sees, keys that every row sees.

    Rows that see nothing do not count. Returns the bounds low, high, core_low, core_high; without
    any row that sees something, low > high.
    """
    sees_M = first_M < last_M
    low = tl.min(tl.where(sees_M, first_M, 2147483647), 0)
    high = tl.max(tl.where(sees_M, last_M, 0), 0)
    core_low = tl.max(tl.where(sees_M, first_M, 0), 0)
    core_high = tl.min(tl.where(sees_M, last_M, 2147483647), 0)
    return low, high, core_low, core_high


@triton.jit
def split(low, high, core_low, core_high, BLOCK: tl.constexpr):
    """Tiles of BLOCK from `low` on: how many, how many before the core, how many inside of it."""
    tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    left = tl.cdiv(tl.maximum(core_low - low, 0), BLOCK)
    left = tl.minimum(left, tiles)
    inside = tl.maximum(core_high - (low + left * BLOCK), 0) // BLOCK
    return tiles, left, tl.minimum(inside, tiles - left)
