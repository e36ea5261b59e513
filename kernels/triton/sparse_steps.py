"""Sparse steps: how kernels over chosen blocks find their rows and their keys.

Shapes: M rows and N keys of a tile.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN201, D417

from __future__ import annotations

import triton
import triton.language as tl

from .steps import LOG2E, narrow


@triton.jit
def load_rows(base, offset_M, live_M, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a tensor with a dense last dim; 0 where not live and beyond its size."""
    at = tl.arange(0, PADDED)
    live = live_M[:, None]
    if SIZE != PADDED:
        live = live & (at < SIZE)[None, :]
    return tl.load(base + offset_M[:, None] + at[None, :], mask=live, other=0.0)


@triton.jit
def store_rows(
    base, offset_M, live_M, rows_MD, SIZE: tl.constexpr, PADDED: tl.constexpr,
    READ_ONCE: tl.constexpr = False,
):  # fmt: skip
    """The opposite of `load_rows`; what is read once and late gets no room in the L2 cache."""
    at = tl.arange(0, PADDED)
    live = live_M[:, None]
    if SIZE != PADDED:
        live = live & (at < SIZE)[None, :]
    to = base + offset_M[:, None] + at[None, :]
    rows = narrow(rows_MD, base.dtype.element_ty)
    if READ_ONCE:
        tl.store(to, rows, mask=live, eviction_policy="evict_first")
    else:
        tl.store(to, rows, mask=live)


@triton.jit
def part_of(near, head, entry, H: tl.constexpr, ENTRIES: tl.constexpr):
    """Number of a partial result: what a choice brings to the heads of a token lies together.

    Args:
        near: Token, counted from the first of the buffer.
        head: Query head.
        entry: Of the row's list of blocks, key tiles counted one by one.
        H: Query heads.
        ENTRIES: Of a list.
    """
    return (near * ENTRIES + entry) * H + head


@triton.jit
def rows_of_group(
    groups, group, row0, unit, R: tl.constexpr, GROUPED: tl.constexpr, LONG: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Tokens and query heads of rows of one query group, and which of them exist."""
    row_M = row0 + tl.arange(0, BM)
    begin, end = group, group + 1
    if GROUPED:
        begin, end = tl.load(groups + group), tl.load(groups + group + 1)
    token_M = begin + row_M // R
    live_M = token_M < end
    if LONG:
        token_M = token_M.to(tl.int64)
    return token_M, unit * R + row_M % R, live_M


@triton.jit
def keys_of_slots(ids, starts, j, N: tl.constexpr, L: tl.constexpr, BN: tl.constexpr):
    """Keys of a list of blocks, laid side by side in L slots each, and which of them exist.

    Args:
        ids: The list's first number.
        starts: Boundaries of the blocks.
        j: First slot.
        N: Length of the list.
        L: At least the keys of the largest block.
        BN: Slots to look at.
    """
    if L % BN == 0:
        entry = j // L
        within = j % L + tl.arange(0, BN)
    else:
        entry = (j + tl.arange(0, BN)) // L
        within = (j + tl.arange(0, BN)) % L
    block = tl.load(ids + entry, mask=entry < N, other=-1)
    begin = tl.load(starts + block, mask=block >= 0, other=0)
    end = tl.load(starts + block + 1, mask=block >= 0, other=0)
    key_N = begin + within
    return key_N, key_N < end


@triton.jit
def list_of_rows(
    ids, owners, token_M, head_M, live_M, C: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Where the list of blocks of each row begins."""
    group_M = token_M
    if GROUPED:
        group_M = tl.load(owners + token_M, mask=live_M, other=0)
    return ids + (group_M.to(tl.int64) * C + head_M // (H // C)) * N


@triton.jit
def choices_of_rows(order, begin, count, row0, R: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """Where in the lists the choices of some rows are, 0 for rows that are not there.

    Of the next rows this is best loaded before the work on the present ones: the address of all
    else depends on it.

    Args:
        order: Choices in the order of the blocks; see `Inverse`.
        begin: The first choice.
        count: How many choices.
        row0: The first row, counted from that choice.
        R: Query heads of a unit.
        M: Query rows of the largest query group.
        BM: Rows to look at.
    """
    choice_M = (row0 + tl.arange(0, BM)) // (M * R)
    return tl.load(order + begin + choice_M, mask=choice_M < count, other=0)


@triton.jit
def rows_of_choices(
    flat_M, groups, count, row0, kv, C: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, GROUPED: tl.constexpr, LONG: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Tokens, query heads and list entries of rows that chose a block, and which of them exist.

    Args:
        flat_M: What `choices_of_rows` gave.
        groups: Boundaries of the query groups.
        count: How many choices.
        row0: The first row, counted from the first choice.
        kv: Key-value head.
        C: Block heads, and so on: see `Shape`.
        BM: Rows to look at.
    """
    row_M = row0 + tl.arange(0, BM)
    within_M = row_M % (M * R)
    live_M = row_M // (M * R) < count
    group_M = (flat_M // (N * C)).to(tl.int32)
    entry_M = (flat_M % N).to(tl.int32)
    token_M = group_M
    if GROUPED:
        token_M = tl.load(groups + group_M, mask=live_M, other=0) + within_M // R
        live_M = live_M & (token_M < tl.load(groups + group_M + 1, mask=live_M, other=0))
    head_M = kv * R + within_M % R
    if C > G:
        head_M = ((flat_M // N) % C).to(tl.int32) * R + within_M % R
    if LONG:
        token_M = token_M.to(tl.int64)
    return token_M, head_M, entry_M, live_M


@triton.jit
def add_bias(logits_MN, bias, head_M, key_N, seen_MN, bt, bh, BIASED: tl.constexpr):
    """Logits with the biases of their keys."""
    if BIASED:
        at = bias + key_N.to(tl.int64)[None, :] * bt + head_M.to(tl.int64)[:, None] * bh
        logits_MN += tl.load(at, mask=seen_MN, other=0.0).to(tl.float32) * LOG2E
    return logits_MN


@triton.jit
def bounds_of(first, last, token_M, live_M):
    """What the reach lets each row see; nothing for rows that are not there."""
    first_M = tl.load(first + token_M, mask=live_M, other=0)
    return first_M, tl.load(last + token_M, mask=live_M, other=0)


@triton.jit
def level_of(lse, delta, row_M, live_M):
    """The lse of each row to base 2, and its delta."""
    level_M = tl.load(lse + row_M, mask=live_M, other=0.0) * LOG2E
    # Where biases hide all that a row sees, -inf minus -inf would be NaN.
    level_M = tl.where(level_M == float("-inf"), 0.0, level_M)
    return level_M, tl.load(delta + row_M, mask=live_M, other=0.0)
