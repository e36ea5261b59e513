"""All-gather: every rank gathers all keys and values in global order, then attends once.

Shapes: T local query rows (and local keys), S keys of the whole sequence, H query heads,
G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.attend import attend, attend_backward
from ..kernels.scoring import Gradients
from .gathering import Gathering
from .seen import Seen


class AllGather:
    """The all-gather exchange over one layout; see `exchange.Method`."""

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Output and lse over all keys."""
        k_SGD, v_SGV = self._gathering.gather(k_TGD), self._gathering.gather(v_TGV)
        how = {"scale": seen.scale, "sink_H": seen.sink_H}
        return attend(q_THD, k_SGD, v_SGV, seen.reach, seen.blocks, **how)

    def backward(
        self,
        dout_THV: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        out_THV: Tensor,
        lse_TH: Tensor,
        dlse_TH: Tensor | None,
        seen: Seen,
    ) -> Gradients:
        """Gathers again; one reduce-scatter returns dk and dv to their owners."""
        k_SGD, v_SGV = self._gathering.gather(k_TGD), self._gathering.gather(v_TGV)
        given = dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, seen.reach, seen.blocks
        how = {"scale": seen.scale, "sink_H": seen.sink_H, "dlse_TH": dlse_TH}
        grads = attend_backward(*given, **how)
        dk_TGD, dv_TGV = self._gathering.scatter([grads.dk_SGD, grads.dv_SGV])
        return grads._replace(dk_SGD=dk_TGD, dv_SGV=dv_TGV)
