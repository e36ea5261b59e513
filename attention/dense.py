"""Dense attention: every query sees every earlier token of its document.

Shapes: T local tokens, E hidden channels, H query heads, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from .context import Context


class Dense(nn.Module):
    """Softmax attention over the whole reach."""

    needs_hidden = False

    def forward(
        self,
        hidden_TE: Tensor | None,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V] of this rank's tokens.

        Args:
            hidden_TE: Not read; may be None.
            q_THD: Queries before RoPE.
            k_TGD: Keys before RoPE.
            v_TGV: Values.
            ctx: The micro-batch.
        """
        q_THD, k_TGD = ctx.rope.apply(q_THD), ctx.rope.apply(k_TGD)
        return ctx.cp.attend(q_THD, k_TGD, v_TGV, ctx.reach, scale=q_THD.shape[-1] ** -0.5)
