"""Scores of pooled keys by a chunk of query rows: two passes, of which only the sum is written.

The first pass finds every row's normaliser with an online softmax; the second computes the
products again, adds up the heads of a choice in registers and writes one score per choosing head,
row and pooled key of the chunk. Any number of heads per key-value head, none padded.

Shapes: T rows, P pooled keys, W of them in sight of a chunk, H query heads, G key-value heads,
C heads that choose (G, or H), D head dim; M rows and N pooled keys of a tile.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reach import Reach
from ..selection_plan import Sight
from ..selection_rule import SelectionRule
from ..workspace import Workspace
from .launch import SMALLEST_DIM, dense_rows
from .steps import LN2, LOG2E, key_range, load_tile, product, split, within
from .tuning import INTERPRETED, autotuned, size_class

MAX_SCORES = 2**26
"""Scores of a chunk, over all choosing heads: 256 MiB."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_DIM = 256


class Scorer:
    """Scores of one selection, chunk by chunk; see the eager one.

    Attributes:
        heads: Heads of which a chunk holds scores.
        most: Scores that a chunk may have over these heads.
        rows: Rows that a chunk may have.
    """

    rows = 2**13

    def __init__(
        self,
        q_THD: Tensor,
        k_PGD: Tensor,
        seen: Reach,
        rule: SelectionRule,
        scale: float,
        lse_TH: Tensor | None,
        coarse: tuple[Tensor, Reach] | None,
    ) -> None:
        reason = refuses(q_THD)
        if reason is not None:
            raise ValueError(reason)
        self.heads = q_THD.shape[1] if rule.heads == "none" else k_PGD.shape[1]
        self.most = MAX_SCORES
        self._q_THD, self._k_PGD = dense_rows(q_THD), dense_rows(k_PGD)
        self._seen, self._rule, self._scale = seen, rule, scale
        self._space = Workspace(torch.float32, q_THD.device)
        if rule.statistic == "logit":
            lse_TH = None
        elif coarse is not None:
            lse_TH = self._coarse_lse(*coarse)
        elif lse_TH is None:
            lse_TH = pooled_lse(self._q_THD, self._k_PGD, seen, scale)
        self._lse_TH = None if lse_TH is None else lse_TH.float()

    def __call__(self, rows: slice, near: Sight) -> Tensor:
        """What the rows think of the windows in sight, [C, T, W], until the next call."""
        height, width = rows.stop - rows.start, len(near)
        scores_CTW = self._space.take("combined", self.heads, height, width)
        if not scores_CTW.numel():
            return scores_CTW
        q, k, device = self._q_THD[rows], self._k_PGD, self._q_THD.device
        lse = None if self._lse_TH is None else self._lse_TH[rows]
        heads, groups = q.shape[1], k.shape[1]
        _score_kernel[
            lambda meta: (
                triton.cdiv(width, meta["KEYS"]) * triton.cdiv(height, meta["ROWS"]),
                self.heads,
            )
        ](
            q, k, scores_CTW, lse,
            self._seen.first.on(device)[rows], self._seen.last.on(device)[rows],
            *q.stride()[:2], *k.stride()[:2], *(lse.stride() if lse is not None else (0, 0)),
            height, near.windows.start, width, float(self._scale),
            size_class(height), size_class(width),
            SHARE=heads // self.heads, CHOICES=self.heads // groups,
            MAX=self._rule.heads == "max", SHARES=lse is not None, **_dims(q),
        )  # fmt: skip
        return scores_CTW

    def _coarse_lse(self, k_PGD: Tensor, seen: Reach) -> Tensor:
        """The lse over the coarser pooled keys, or the exact one of rows that see none."""
        lse_TH = pooled_lse(self._q_THD, dense_rows(k_PGD), seen, self._scale)
        near = self._seen
        sees_T = seen.first_T < seen.last_T
        rest = Reach(near.first_T, torch.where(sees_T, near.first_T, near.last_T))
        if rest.empty:
            return lse_TH
        exact_TH = pooled_lse(self._q_THD, self._k_PGD, rest, self._scale)
        return torch.where(lse_TH == float("-inf"), exact_TH, lse_TH)


def refuses(q_THD: Tensor) -> str | None:
    """Why the kernels here cannot serve these queries; None if they can."""
    if q_THD.device.type != "cuda" and not INTERPRETED:
        return (f"Triton scores pooled keys on CUDA devices, not on {q_THD.device}, "
                "unless it is interpreted (TRITON_INTERPRET=1)")  # fmt: skip
    if q_THD.dtype not in DTYPES or q_THD.shape[2] > LARGEST_DIM:
        return (f"Triton scores pooled keys in float16, bfloat16 and float32 with head dims up to "
                f"{LARGEST_DIM}, not {q_THD.dtype} with {q_THD.shape[2]}")  # fmt: skip
    return None


def pooled_lse(q_THD: Tensor, k_PGD: Tensor, seen: Reach, scale: float) -> Tensor:
    """The natural-log lse of each row and head over what it sees, fp32 [T, H].

    Args:
        q_THD: Queries, the elements of a row next to each other.
        k_PGD: Pooled keys, likewise.
        seen: Which of them each row sees; -inf for rows that see none.
        scale: Of the scores.
    """
    rows, heads = q_THD.shape[:2]
    lse_TH = torch.empty(rows, heads, dtype=torch.float32, device=q_THD.device)
    if seen.empty:
        return lse_TH.fill_(float("-inf"))
    device = q_THD.device
    _lse_kernel[lambda meta: (triton.cdiv(rows, meta["ROWS"]), heads)](
        q_THD, k_PGD, lse_TH, seen.first.on(device), seen.last.on(device),
        *q_THD.stride()[:2], *k_PGD.stride()[:2], rows, len(k_PGD), float(scale),
        size_class(rows), size_class(len(k_PGD)),
        GROUP=heads // k_PGD.shape[1], **_dims(q_THD),
    )  # fmt: skip
    return lse_TH


def _dims(q_THD: Tensor) -> dict[str, int]:
    dim = q_THD.shape[2]
    width = max(SMALLEST_DIM, triton.next_power_of_2(dim))
    return {"DIM": dim, "BLOCK_D": width, "BYTES": q_THD.element_size()}


def _options(launch: dict[str, Any]) -> list[triton.Config]:
    """Best guesses first, by the dim and the bytes of an element."""
    if INTERPRETED:
        return [_config(32, 16, 4, 1)]
    if launch["BYTES"] > 2:
        return [_config(64, 32, 4, 2), _config(32, 32, 4, 2)]
    if launch["BLOCK_D"] <= 128:
        return [_config(64, 128, 4, 3), _config(128, 64, 4, 2), _config(64, 64, 4, 2)]
    return [_config(128, 64, 8, 2), _config(64, 64, 4, 2)]


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)


@autotuned(_options, ["GROUP", "BLOCK_D", "row_class", "key_class"])
@triton.jit(do_not_specialize=["row_class", "key_class"])
def _lse_kernel(
    q, k, lse, first, last, q_row, q_head, k_row, k_head, rows, keys, scale, row_class, key_class,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BYTES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Later rows reach more keys when the reach is causal: the longest programs start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    row_M = start + tl.arange(0, ROWS)
    first_M = tl.load(first + row_M, mask=row_M < rows, other=0)
    last_M = tl.load(last + row_M, mask=row_M < rows, other=0)
    low, high, core_low, core_high = key_range(first_M, last_M)
    tiles, left, inside = split(low, high, core_low, core_high, KEYS)
    k += (head // GROUP).to(tl.int64) * k_head
    q += head.to(tl.int64) * q_head
    q_MD = load_tile(q, start, q_row, rows, ROWS, DIM, BLOCK_D, EDGE=True)
    sum_M = tl.zeros([ROWS], dtype=tl.float32)
    peak_M = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for step in range(inside):
        begin = low + (left + step) * KEYS
        k_ND = load_tile(k, begin, k_row, keys, KEYS, DIM, BLOCK_D, EDGE=False)
        logits_MN = product(q_MD, tl.trans(k_ND)) * (scale * LOG2E)
        sum_M, peak_M = _add(sum_M, peak_M, logits_MN)
    for step in range(tiles - inside):
        begin = low + tl.where(step < left, step, step + inside) * KEYS
        k_ND = load_tile(k, begin, k_row, keys, KEYS, DIM, BLOCK_D, EDGE=True)
        logits_MN = product(q_MD, tl.trans(k_ND)) * (scale * LOG2E)
        key_N = begin + tl.arange(0, KEYS)
        visible_MN = within(first_M[:, None], last_M[:, None], key_N[None, :])
        sum_M, peak_M = _add(sum_M, peak_M, tl.where(visible_MN, logits_MN, float("-inf")))
    # Tiles without a mask ask only rows that see something.
    nothing_M = (first_M >= last_M) | (sum_M == 0.0)
    lse_M = (peak_M + tl.log2(tl.where(nothing_M, 1.0, sum_M))) * LN2
    at_M = lse + row_M.to(tl.int64) * tl.num_programs(1) + head
    tl.store(at_M, tl.where(nothing_M, float("-inf"), lse_M), mask=row_M < rows)


@triton.jit
def _add(sum_M, peak_M, logits_MN):
    """One step of an online normaliser."""
    new_M = tl.maximum(peak_M, tl.max(logits_MN, 1))
    level_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    more_M = tl.sum(tl.exp2(logits_MN - level_M[:, None]), 1)
    return sum_M * tl.exp2(peak_M - level_M) + more_M, new_M


@autotuned(_options, ["SHARE", "BLOCK_D", "MAX", "SHARES", "row_class", "key_class"])
@triton.jit(do_not_specialize=["row_class", "key_class", "begin", "width"])
def _score_kernel(
    q, k, out, lse, first, last, q_row, q_head, k_row, k_head, lse_row, lse_head,
    rows, begin, width, scale, row_class, key_class,
    SHARE: tl.constexpr, CHOICES: tl.constexpr, MAX: tl.constexpr, SHARES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BYTES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of scores; pooled keys `begin` to `begin + width` are in sight."""
    # Tiles of the same pooled keys follow each other: these stay in the L2 cache.
    tiles = tl.cdiv(rows, ROWS)
    start = (tl.program_id(0) % tiles) * ROWS
    at = (tl.program_id(0) // tiles) * KEYS
    choice = tl.program_id(1)
    row_M = start + tl.arange(0, ROWS)
    key_N = begin + at + tl.arange(0, KEYS)
    first_M = tl.load(first + row_M, mask=row_M < rows, other=0)
    last_M = tl.load(last + row_M, mask=row_M < rows, other=0)
    low, high, _core_low, _core_high = key_range(first_M, last_M)
    fill = 0.0
    if MAX and not SHARES:
        fill = float("-inf")
    total_MN = tl.full([ROWS, KEYS], fill, dtype=tl.float32)
    if (begin + at < high) & (begin + at + KEYS > low):
        k += (choice // CHOICES).to(tl.int64) * k_head
        k_ND = load_tile(k, begin + at, k_row, begin + width, KEYS, DIM, BLOCK_D, EDGE=True)
        k_DN = tl.trans(k_ND)
        for member in range(SHARE):
            head = (choice * SHARE + member).to(tl.int64)
            q_MD = load_tile(q + head * q_head, start, q_row, rows, ROWS, DIM, BLOCK_D, EDGE=True)
            score_MN = product(q_MD, k_DN)
            if SHARES:
                lse_at = lse + row_M.to(tl.int64) * lse_row + head * lse_head
                lse_M = tl.load(lse_at, mask=row_M < rows, other=0.0)
                lse_M = tl.where(lse_M == float("-inf"), 0.0, lse_M) * LOG2E
                score_MN = tl.exp2(score_MN * (scale * LOG2E) - lse_M[:, None])
            else:
                score_MN = score_MN * scale
            if MAX:
                total_MN = tl.maximum(total_MN, score_MN, propagate_nan=tl.PropagateNan.ALL)
            else:
                total_MN += score_MN
        visible_MN = within(first_M[:, None], last_M[:, None], key_N[None, :])
        total_MN = tl.where(visible_MN, total_MN, fill)
    out += (choice.to(tl.int64) * rows + start) * width
    at_MN = out + tl.arange(0, ROWS)[:, None].to(tl.int64) * width + (key_N - begin)[None, :]
    inside_MN = (row_M < rows)[:, None] & (key_N < begin + width)[None, :]
    tl.store(at_MN, total_MN, mask=inside_MN)
