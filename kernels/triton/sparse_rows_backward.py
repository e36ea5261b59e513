"""By row, backward: dq where query groups are large; for tiny blocks dk and dv, too.

The loop is that of the forward. See `sparse_rows`.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse_rows import grid, row_options
from .sparse_shape import TUNED_BY, Inputs
from .sparse_steps import (
    add_bias,
    bounds_of,
    keys_of_slots,
    level_of,
    load_rows,
    rows_of_group,
    store_rows,
)
from .steps import dot, logits_of, narrow, product, slope_of, within
from .tuning import autotuned


def options(constants: dict[str, Any]) -> Sequence[triton.Config]:
    """As in the forward, with fewer rows: one more operand is held."""
    configs = row_options(constants, 64)
    # Whoever adds must run once: nothing to try.
    return configs[:1] if constants["ATOMIC"] else configs


def queries(
    inputs: Inputs, dout: Tensor, lse: Tensor, delta: Tensor,
    sums: tuple[Tensor, Tensor, Tensor | None] | None,
) -> Tensor:  # fmt: skip
    """dq [T, H, D] in fp32.

    Args:
        inputs: Of the forward.
        dout: Gradient of the output, its last dim dense.
        lse: Natural-log lse [T, H], dense.
        delta: dout . out - dlse, [T, H], dense.
        sums: Gradients of keys, values and biases to add to, in an order that changes from run to
            run; None to leave them alone.
    """
    q = inputs.q
    dq = torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    dk, dv, dbias = sums or (dq, dq, None)
    _queries[grid(inputs)](
        q, inputs.k, inputs.v, inputs.bias, dout, lse, delta, dq, dk, dv,
        dq if dbias is None else dbias, *inputs.where, *inputs.strides,
        dout.stride(0), dout.stride(1), *inputs.score, **inputs.constants, ATOMIC=sums is not None,
    )  # fmt: skip
    return dq


@autotuned(options, key=[*TUNED_BY, "ATOMIC"])
@triton.jit(do_not_specialize=["query_class"])
def _queries(
    q, k, v, bias, dout, lse, delta, dq, dk, dv, dbias, ids, starts, groups, first, last,
    qt, qh, kt, kh, vt, vh, bt, bh, ot, oh, scale, softcap, query_class,
    C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    CAP: tl.constexpr, BIASED: tl.constexpr, GROUPED: tl.constexpr, BYTES: tl.constexpr,
    LONG: tl.constexpr, PLAIN: tl.constexpr,
    ATOMIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (M * R + BM - 1) // BM
    units: tl.constexpr = C if C > G else G
    heads: tl.constexpr = units * R
    group, unit = tl.program_id(0) // tiles, tl.program_id(1)
    row0 = tl.program_id(0) % tiles * BM
    chooser, kv = unit // (units // C), unit // (units // G)
    token_M, head_M, live_M = rows_of_group(groups, group, row0, unit, R, GROUPED, LONG, BM)
    ids += (group.to(tl.int64) * C + chooser) * N
    k += kv.to(tl.int64) * kh
    v += kv.to(tl.int64) * vh
    q_MD = load_rows(q, token_M * qt + head_M * qh, live_M, D, DP)
    dout_MV = narrow(load_rows(dout, token_M * ot + head_M * oh, live_M, V, VP), k.dtype.element_ty)
    row_M = token_M * heads + head_M
    level_M, delta_M = level_of(lse, delta, row_M, live_M)
    first_M, last_M = bounds_of(first, last, token_M, live_M)
    dq_MD = tl.zeros([BM, DP], tl.float32)
    for j in range(0, N * L, BN):
        key_N, exists_N = keys_of_slots(ids, starts, j, N, L, BN)
        at_N = key_N.to(tl.int64)
        k_ND = load_rows(k, at_N * kt, exists_N, D, DP)
        v_NV = load_rows(v, at_N * vt, exists_N, V, VP)
        seen_MN = exists_N[None, :] & within(first_M[:, None], last_M[:, None], key_N[None, :])
        capped_MN = logits_of(product(q_MD, tl.trans(k_ND)), scale, softcap, CAP)
        logits_MN = add_bias(capped_MN, bias, head_M, key_N, seen_MN, bt, bh, BIASED)
        weights_MN = tl.where(seen_MN, tl.exp2(logits_MN - level_M[:, None]), 0.0)
        dlogits_MN = weights_MN * (product(dout_MV, tl.trans(v_NV)) - delta_M[:, None])
        if ATOMIC and BIASED:
            to = dbias + at_N[None, :] * heads + head_M[:, None]
            tl.atomic_add(to, dlogits_MN, mask=seen_MN, sem="relaxed")
        if CAP:
            dlogits_MN *= slope_of(capped_MN, softcap)
        dlogits_MN = narrow(dlogits_MN, q_MD.dtype)
        dq_MD = dot(dlogits_MN, k_ND, dq_MD)
        if ATOMIC:
            dk_ND = product(tl.trans(dlogits_MN), q_MD) * scale
            dv_NV = product(tl.trans(narrow(weights_MN, q_MD.dtype)), dout_MV)
            _add_rows(dk, (at_N * G + kv) * D, exists_N, dk_ND, D, DP)
            _add_rows(dv, (at_N * G + kv) * V, exists_N, dv_NV, V, VP)
    store_rows(dq, row_M * D, live_M, dq_MD * scale, D, DP)


@triton.jit
def _add_rows(base, offset_M, live_M, rows_MD, SIZE: tl.constexpr, PADDED: tl.constexpr):
    at = tl.arange(0, PADDED)
    live = live_M[:, None] & (at < SIZE)[None, :]
    tl.atomic_add(base + offset_M[:, None] + at[None, :], rows_MD, mask=live, sem="relaxed")
