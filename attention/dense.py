"""Dense attention: every query sees every earlier token of its document.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from .context import Context


class Dense(nn.Module):
    """Softmax attention over the whole reach."""

    needs_hidden = False

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
        ctx.look(q_THD, k_SGD)
        return ctx.attend(q_THD, k_SGD, v_SGV, ctx.reach)[0]
