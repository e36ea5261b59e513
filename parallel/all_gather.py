"""All-gather: every rank gathers all keys and values in global order, then attends once.

Shapes: T local query rows (and local keys), S keys of the whole sequence, H query heads,
G key-value heads, D key dim, V value dim, P ranks, X = D + V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attend import attend, attend_backward
from ..kernels.scoring import Gradients
from .layout import Layout
from .seen import Seen
from .transport import Transport


class AllGather:
    """The all-gather exchange over one layout; see `exchange.Method`."""

    def __init__(self, layout: Layout, transport: Transport) -> None:
        self.transport = transport
        self._chunks = layout.local_chunks()

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Output and lse over all keys."""
        k_SGD, v_SGV = self._gather(k_TGD), self._gather(v_TGV)
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
        k_SGD, v_SGV = self._gather(k_TGD), self._gather(v_TGV)
        given = dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, seen.reach, seen.blocks
        how = {"scale": seen.scale, "sink_H": seen.sink_H, "dlse_TH": dlse_TH}
        grads = attend_backward(*given, **how)
        reduced_TGX = self._reduce(grads.dk_SGD, grads.dv_SGV)
        widths = [k_SGD.shape[2], v_SGV.shape[2]]
        dk_TGD, dv_TGV = reduced_TGX.split(widths, dim=2)
        return grads._replace(dk_SGD=dk_TGD, dv_SGV=dv_TGV)

    def _gather(self, x_TGD: Tensor) -> Tensor:
        """All ranks' tokens in global order, [S, G, D]."""
        gathered_PTGD = self.transport.all_gather(x_TGD)
        return torch.cat([gathered_PTGD[rank, start:stop] for rank, start, stop in self._chunks])

    def _reduce(self, dk_SGD: Tensor, dv_SGV: Tensor) -> Tensor:
        """Sums over ranks of dk and dv of this rank's own tokens, side by side: [T, G, D + V]."""
        size, groups, width = self.transport.size, dk_SGD.shape[1], dk_SGD.shape[2]
        side_PTGX = dk_SGD.new_empty(size, len(dk_SGD) // size, groups, width + dv_SGV.shape[2])
        begin = 0
        for rank, start, stop in self._chunks:
            end = begin + stop - start
            side_PTGX[rank, start:stop, :, :width] = dk_SGD[begin:end]
            side_PTGX[rank, start:stop, :, width:] = dv_SGV[begin:end]
            begin = end
        return self.transport.reduce_scatter(side_PTGX)
