"""MoBA: each query head sees its own block and the earlier ones whose mean key it likes best.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.selection_rule import SelectionRule
from .context import Context
from .mean_keys import choose_by_mean_keys
from .mechanism_settings import MobaSettings
from .probe import in_blocks


class Moba(nn.Module):
    """Mixture of block attention (Moonshot AI, arXiv 2502.13189, section 2.2).

    The gate is the product of a query and the mean of a block's turned keys, without a gradient.
    The last block of a document may be incomplete: only its own queries ever see it.
    """

    needs_hidden = False

    def __init__(self, settings: MobaSettings) -> None:
        super().__init__()
        self.block = settings.block
        self.rule = SelectionRule(settings.count, statistic="logit", heads="none")

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        q_THD, k_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        blocks = ctx.choose(
            "blocks", lambda: choose_by_mean_keys(q_THD, k_SGD, self.block, self.rule, ctx)
        )
        ctx.look(q_THD, k_SGD, in_blocks(blocks))
        return ctx.attend(q_THD, k_SGD, v_SGV, ctx.reach, blocks)[0]
