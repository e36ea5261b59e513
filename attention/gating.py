"""Output gates: the output of attention, scaled by what the token's layer input says.

Shapes: T query rows, E hidden channels, H query heads, V value dim, X = H or H * V.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import linear

from .context import Context
from .site import Site


class OutputGate(nn.Module):
    """out * sigmoid(W hidden) before the output projection (Qiu et al. 2025, arXiv 2505.06708).

    Args:
        per: A gate per head, or per channel.
        site: Where it works.
    """

    def __init__(self, per: Literal["head", "channel"], site: Site) -> None:
        super().__init__()
        rows = site.heads * (1 if per == "head" else site.dim)
        self.weight = site.parameter(rows, site.hidden, by_head=True)

    def forward(self, hidden_TE: Tensor, out_THV: Tensor, ctx: Context) -> Tensor:
        """The gated output [T, H, V]."""
        gate_TX = linear(hidden_TE, self.weight).sigmoid()
        ctx.measure("gate", gate_TX)
        return out_THV * gate_TX.unflatten(1, (out_THV.shape[1], -1))
