"""Probe: what a few queries look at, layer by layer, measured now and then.

Shapes: T query rows, S keys, n keys that a row reaches, H query heads, G key-value heads, D key
dim, C block heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.precision import wide
from ..kernels.reach import Reach

MEASURES = (
    "kept",
    "recall",
    "entropy",
    "sink_share",
    "gate",
    "compressed_gate",
    "selected_gate",
    "window_gate",
    "alignment",
)
"""kept: share of the keys in reach that a query sees; recall: share of full attention's weights
that lies on them; entropy: of these weights, in nats; sink_share: their part on the document's
first token and the learned sink; then the mean of each gate, and the distance of SSA's streams."""

Chosen = Callable[[int, int, int], Tensor]
"""For a row and its reach [first, last): which of the keys it sees, bool [C, n]."""


class Probe:
    """Sums of measures, and how many terms they have. Measuring waits for the device.

    Args:
        layers: Of the whole model.
        rows: Queries to look at in each layer.
        device: Of the model.

    Attributes:
        sums: fp64 [layers, measures, 2].
    """

    def __init__(self, layers: int, rows: int, device: torch.device) -> None:
        self.rows = rows
        shape = layers, len(MEASURES), 2
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, layer: int, measure: str, value: Tensor, terms: int = 1) -> None:
        """Add the mean of all elements.

        Args:
            layer: Number of the layer.
            measure: See `MEASURES`.
            value: The elements.
            terms: For how many terms it counts: rows, of which ranks may have differently many.
        """
        pair = self.sums[layer, MEASURES.index(measure)]
        pair[0] += value.detach().double().sum() * (terms / max(1, value.numel()))
        pair[1] += terms

    @torch.no_grad()
    def look(
        self,
        layer: int,
        q_THD: Tensor,
        k_SGD: Tensor,
        reach: Reach,
        scale: float,
        sink_H: Tensor | None,
        chosen: Chosen | None,
        weights_T: Tensor | None = None,
    ) -> None:
        """Compare what a few queries see with full attention over their reach.

        Args:
            layer: Number of the layer.
            q_THD: Turned queries.
            k_SGD: Turned keys.
            reach: All keys that each query might see.
            scale: Of the scores.
            sink_H: The learned score with nothing behind it.
            chosen: What they do see; None for everything.
            weights_T: Of the queries' tokens: padding has none and is not looked at.
        """
        for row in self._some(reach, weights_T):
            first, last = int(reach.first_T[row]), int(reach.last_T[row])
            k_nGD = wide(k_SGD[first:last])
            q_GrD = wide(q_THD[row]).unflatten(0, (k_nGD.shape[1], -1))
            scores_Hn = (q_GrD @ k_nGD.permute(1, 2, 0)).flatten(0, 1) * scale
            sink_H1 = _sink(sink_H, scores_Hn)
            weights_Hn = torch.cat([sink_H1, scores_Hn], dim=1).softmax(1)
            # The sink has weight exp(-inf) = 0 where there is none, and 0 log 0 is 0.
            self.add(layer, "entropy", -torch.xlogy(weights_Hn, weights_Hn).sum(1))
            self.add(layer, "sink_share", weights_Hn[:, :2].sum(1))
            if chosen is None:
                continue
            seen_Cn = chosen(row, first, last).to(weights_Hn.device)
            heads = len(scores_Hn) // len(seen_Cn)
            seen_Hn = seen_Cn.repeat_interleave(heads, dim=0)
            self.add(layer, "kept", seen_Cn.double())
            kept_H = (weights_Hn[:, 1:] * seen_Hn).sum(1)
            self.add(layer, "recall", kept_H / (1 - weights_Hn[:, 0]).clamp(min=1e-9))

    def _some(self, reach: Reach, weights_T: Tensor | None) -> list[int]:
        """Rows that see something and count, evenly spaced."""
        seeing_T = reach.first_T < reach.last_T
        if weights_T is not None:
            seeing_T = seeing_T & (weights_T.cpu() > 0)
        seeing = seeing_T.nonzero()[:, 0]
        count = min(self.rows, len(seeing))
        at = (torch.arange(count) + 1) * len(seeing) // max(1, count) - 1
        return seeing[at].tolist()

    def table(self) -> list[dict[str, float]]:
        """The means per layer, of what was measured; waits for the device."""
        return [
            {
                name: total / count
                for name, (total, count) in zip(MEASURES, pairs, strict=True)
                if count
            }
            for pairs in self.sums.tolist()
        ]


def in_reach(*reaches: Reach) -> Chosen:
    """Rows that see the keys of some smaller reaches, all heads alike."""

    def chosen(row: int, first: int, last: int) -> Tensor:
        seen_1n = torch.zeros(1, last - first, dtype=torch.bool)
        for reach in reaches:
            begin, end = int(reach.first_T[row]), int(reach.last_T[row])
            seen_1n[:, max(0, begin - first) : max(0, end - first)] = True
        return seen_1n

    return chosen


def in_blocks(blocks: Blocks) -> Chosen:
    """Rows that see the blocks that they chose."""

    def chosen(row: int, first: int, last: int) -> Tensor:
        group = row
        if blocks.query_starts is not None:
            at = torch.tensor([row])
            group = int(torch.searchsorted(blocks.query_starts, at, right=True)) - 1
        ids_CN = blocks.ids_QCN[group].long()
        # One more place for the choices of nothing.
        picked_CB = ids_CN.new_zeros(len(ids_CN), len(blocks.grid) + 1, dtype=torch.bool)
        picked_CB.scatter_(1, ids_CN + 1, True)
        key_n = torch.arange(first, last)
        block_n = torch.searchsorted(blocks.grid.starts_B1, key_n, right=True)
        picked_CB[:, 0] = False
        return picked_CB[:, block_n.to(ids_CN.device)]

    return chosen


def _sink(sink_H: Tensor | None, scores_Hn: Tensor) -> Tensor:
    if sink_H is None:
        return scores_Hn.new_full((len(scores_Hn), 1), float("-inf"))
    return sink_H.to(scores_Hn.dtype)[:, None]
