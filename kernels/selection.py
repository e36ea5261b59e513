"""Selection: the blocks that each query chooses by what it thinks of pooled keys.

It has no gradient. Scores exist for a chunk of queries at a time.
Shapes: T query rows, Q query groups, H query heads, G key-value heads, D head dim, P pooled keys,
B blocks, C heads that choose (G, or H), N blocks per choice; W windows in sight of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import selection_steps
from .blocks import Blocks
from .boundaries import boundaries
from .grid import Grid
from .pooled import Pooled
from .precision import wide_dtype
from .reach import Reach
from .selection_plan import Chunk, SelectionPlan, plan, visible
from .selection_rule import SelectionRule
from .top import top_ids
from .transfer import to_device
from .windows import Windows


@torch.no_grad()
def select_blocks(
    q_THD: Tensor,
    k_PGD: Tensor,
    windows: Windows,
    grid: Grid,
    reach: Reach,
    rule: SelectionRule,
    *,
    scale: float,
    lse_TH: Tensor | None = None,
    coarse: Pooled | None = None,
    query_starts: Tensor | None = None,
) -> Blocks:
    """The blocks of `grid` that each query (or query group) chooses; see `SelectionRule`.

    A query scores the windows that lie wholly in its reach. Its blocks are those that its reach
    meets: the first is where the reach begins, the last is its own, and no other is ever chosen.
    Blocks without a scored window come last, with probability 0 (or after every logit), so a query
    that sees no window yet has its forced blocks and then the lowest others. Of equal scores the
    lowest block is chosen; a query that reaches fewer blocks than the rule wants has them all.

    The rows of a query group are one chooser, over the hull of what they reach: its local blocks
    begin with those of its earliest row and end with the block of its latest. Later rows of a
    group bear on the choice of earlier ones.

    Args:
        q_THD: Queries.
        k_PGD: Pooled keys; see `pool`.
        windows: Of the pooled keys.
        grid: The blocks to choose from.
        reach: The keys that each query sees.
        rule: What is chosen.
        scale: Of the scores.
        lse_TH: The lse of each query and head over the windows that it sees, if it is known: of
            the compressed branch. Probabilities only.
        coarse: Coarser pooled keys, from which the lse is taken instead (InfLLM-V2, arXiv
            2509.24663, section 3.3); where a query sees none of them it is exact.
        query_starts: Boundaries of the query groups, ascending from 0, int64 [Q + 1] on the
            host; None if each query chooses for itself.

    Returns:
        The choices, `rule.total` per query group and choosing head.

    Raises:
        ValueError: Shapes that contradict each other, a rule that forces more blocks on a query
            group than it chooses, an lse that has no use, or logits of a query group whose rows
            are not neighbours.
    """
    _check(q_THD, k_PGD, windows, grid, reach, query_starts)
    _check_lse(q_THD, k_PGD, windows.keys, rule, lse_TH, coarse)
    todo = plan(windows, grid, reach, query_starts)
    forced = todo.most_forced(rule.initial, rule.local)
    if forced > rule.total:
        raise ValueError(f"the rule chooses {rule.total} blocks but forces {forced} on a query "
                         "group that lies in several")  # fmt: skip
    if rule.statistic == "logit" and todo.grouped and not todo.joined:
        raise ValueError("logits of a query group whose rows see windows with others between that "
                         "no row sees: end groups where rows are not neighbours")  # fmt: skip
    far = None if coarse is None else (coarse.k_PGD, visible(coarse.windows, reach))
    scorer, block_scores = selection_steps(q_THD)
    with torch.cuda.device_of(q_THD):
        score = scorer(q_THD, k_PGD, todo.seen, rule, scale, lse_TH, far)
    choosers = q_THD.shape[1] if rule.heads == "none" else k_PGD.shape[1]
    shape = len(todo.starts_Q1) - 1, choosers, rule.total
    ids_QCN = torch.full(shape, -1, dtype=torch.int32, device=q_THD.device)
    of_blocks = block_scores(todo, rule, q_THD.device, wide_dtype(q_THD))
    with torch.cuda.device_of(q_THD):
        for chunk in todo.chunks(score.heads, score.rows, score.most):
            if chunk.blocks.start < chunk.blocks.stop:
                scores_CQW = _of_groups(todo, rule, chunk, score(chunk.rows, chunk.sight))
                ids_QCN[chunk.groups] = _top(of_blocks(chunk, scores_CQW), rule.total, chunk)
    return Blocks(ids_QCN, grid, query_starts)


def _top(scores_CQB: Tensor, count: int, chunk: Chunk) -> Tensor:
    """The choices of a chunk, int32 [Q, C, N]."""
    ids = top_ids(scores_CQB.flatten(0, 1), count).view(*scores_CQB.shape[:2], -1)
    return torch.where(ids < 0, ids, ids + chunk.blocks.start).transpose(0, 1)


def _of_groups(
    todo: SelectionPlan, rule: SelectionRule, chunk: Chunk, scores_CTW: Tensor
) -> Tensor:
    """Scores of rows as scores of their query groups, [C, Q, W]."""
    if not todo.grouped:
        return scores_CTW
    starts = todo.starts_Q1[chunk.groups.start : chunk.groups.stop + 1]
    sizes = starts.diff()
    largest = rule.heads == "max"
    if int(sizes.min()) == int(sizes.max()):
        scores_CQtW = scores_CTW.unflatten(1, (len(sizes), -1))
        return scores_CQtW.amax(2) if largest else scores_CQtW.sum(2)
    device = scores_CTW.device
    starts_Q, sizes_Q = (to_device(x, device) for x in (starts[:-1] - chunk.rows.start, sizes))
    total_CQW = scores_CTW.new_zeros(len(scores_CTW), len(sizes), scores_CTW.shape[2])
    for step in range(int(sizes.max())):
        at_Q = (starts_Q + step).clamp(max=scores_CTW.shape[1] - 1)
        part_CQW = scores_CTW.index_select(1, at_Q)
        there_Q1 = (step < sizes_Q)[:, None]
        if largest:
            more_CQW = torch.maximum(total_CQW, part_CQW) if step else part_CQW
            total_CQW = torch.where(there_Q1, more_CQW, total_CQW)
        else:
            total_CQW += part_CQW.masked_fill_(~there_Q1, 0.0)
    return total_CQW


def _check(
    q: Tensor, k: Tensor, windows: Windows, grid: Grid, reach: Reach, groups: Tensor | None
) -> None:
    shapes = f"q {list(q.shape)}, pooled k {list(k.shape)}"
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2]:
        raise ValueError(f"selection wants q [T, H, D] and pooled k [P, G, D], not {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key-value heads: {shapes}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q and pooled k must share dtype and device, not {q.dtype} on "
                         f"{q.device}, {k.dtype} on {k.device}")  # fmt: skip
    if len(q) != len(reach) or len(k) != len(windows):
        raise ValueError(f"{shapes}, but a reach of {len(reach)} and {len(windows)} windows")
    if reach.stop > windows.keys:
        raise ValueError(f"a reach up to {reach.stop}, but windows over {windows.keys} keys")
    if windows.keys != int(grid.starts_B1[-1]):
        raise ValueError(f"windows over {windows.keys} keys and blocks of "
                         f"{int(grid.starts_B1[-1])}")  # fmt: skip
    if groups is not None:
        boundaries(groups, "query groups", stop=len(q))
        if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
            raise ValueError("boundaries of query groups must be a tensor of int64 on the host")


def _check_lse(
    q: Tensor, k: Tensor, keys: int, rule: SelectionRule, lse: Tensor | None, coarse: Pooled | None
) -> None:
    if lse is None and coarse is None:
        return
    if rule.statistic == "logit" or (lse is not None and coarse is not None):
        raise ValueError("probabilities take one lse or coarser keys to take it from, not both; "
                         "logits take neither")  # fmt: skip
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(f"the lse must be [T, H] = {list(q.shape[:2])}, not {list(lse.shape)}")
    if coarse is not None and coarse.windows.keys != keys:
        raise ValueError(f"coarser keys of {coarse.windows.keys} keys beside {keys}")
    if coarse is not None and (coarse.k_PGD.dtype, coarse.k_PGD.device) != (k.dtype, k.device):
        raise ValueError(f"coarser keys in {coarse.k_PGD.dtype} on {coarse.k_PGD.device} beside "
                         f"{k.dtype} on {k.device}")  # fmt: skip
    if coarse is not None and coarse.k_PGD.shape[1:] != k.shape[1:]:
        raise ValueError(f"coarser keys [P, G, D] = {list(coarse.k_PGD.shape)} beside "
                         f"{list(k.shape)}")  # fmt: skip
