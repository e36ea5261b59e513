"""Mean keys: the choice of blocks by the mean of their keys, which MoBA and SSA share.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.pool import pool
from ..kernels.selection import select_blocks
from ..kernels.selection_rule import SelectionRule
from .context import Context


def choose_by_mean_keys(
    q_THD: Tensor, k_SGD: Tensor, block: int, rule: SelectionRule, ctx: Context
) -> Blocks:
    """The blocks that each query chooses; it carries no gradient.

    Only complete blocks have a mean. The last one of a document may be incomplete, but it is never
    chosen by others: nothing comes after it.

    Args:
        q_THD: Turned queries.
        k_SGD: Turned keys.
        block: Tokens of a block.
        rule: What is chosen.
        ctx: The micro-batch.
    """
    documents = ctx.documents
    windows = documents.windows(block, block)
    means_BGD = ctx.pooled(k_SGD.detach(), windows, lambda k, some: pool(k, some, "mean"))
    grid, scale = documents.grid(block), ctx.scale_of(q_THD)
    return select_blocks(q_THD, means_BGD, windows, grid, ctx.reach, rule, scale=scale)
