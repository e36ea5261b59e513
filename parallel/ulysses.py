"""Ulysses: ranks trade tokens for heads, attend, and trade back.

Shapes: T local query rows (and local keys), N tokens of all ranks that trade, H query heads, G
key-value heads, D key dim, V value dim; h and g of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.reach import Reach
from ..kernels.scoring import Gradients
from .head_trade import HeadTrade, by_groups, by_heads
from .heads import Share, of_share, split_heads
from .method import Kept, Method
from .seen import Seen
from .transport import Transport


class Ulysses:
    """Sequence parallelism by heads (DeepSpeed-Ulysses, arXiv 2309.14509); see `Method`.

    Query heads stay with their key-value head. Where several ranks have the same one, they have
    its keys and values each, and their gradients add up in the accumulators' dtype.

    Args:
        transport: Between the ranks that trade.
        members: Global positions of each one's tokens, ascending, on the host.
        inner: How a rank attends with its heads to all keys, over ranks with the same heads.
    """

    def __init__(self, transport: Transport, members: Sequence[Tensor], inner: Method) -> None:
        self._trade = HeadTrade(transport, members)
        self._rank, self._size, self._inner = transport.rank, transport.size, inner

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output and lse; kept are this rank's heads."""
        heads, groups = q_THD.shape[1], k_TGD.shape[1]
        if self._size > heads:
            raise ValueError(f"{self._size} ranks cannot share {heads} query heads")
        shares = split_heads(heads, groups, self._size)
        tensors, cuts = [q_THD, k_TGD, v_TGV], [by_heads, by_groups, by_groups]
        if seen.blocks is not None:
            tensors.append(seen.blocks.ids_QCN)
            cuts.append(partial(of_share, heads=heads, groups=groups))
        q_NhD, k_NgD, v_NgV, *ids = self._trade.to_heads(tensors, cuts, shares)
        of_heads = self._seen(seen, shares[self._rank], ids)
        out_NhV, lse_Nh, kept = self._inner.forward(q_NhD, k_NgD, v_NgV, of_heads)
        outs, lses = self._trade.to_tokens([out_NhV, lse_Nh], [by_heads] * 2, shares)
        return torch.cat(outs, 1), torch.cat(lses, 1), replace(kept, shares=tuple(shares))

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Gradients; only those of the output travel to the heads."""
        shares, own = kept.shares, kept.shares[self._rank]
        given = [dout_THV] if dlse_TH is None else [dout_THV, dlse_TH]
        dout_NhV, *dlse = self._trade.to_heads(given, [by_heads] * len(given), shares)
        dlse_Nh = dlse[0] if dlse else None
        grads = self._inner.backward(dout_NhV, dlse_Nh, replace(kept, shares=()))
        parts = [grads.dq_THD.to(kept.q.dtype), grads.dk_SGD, grads.dv_SGV]
        shared = len({share.groups.start for share in shares}) < len(shares)
        if not shared:
            # They are complete, so that nothing is lost but what is lost at the end.
            parts[1:] = (part.to(kept.k.dtype) for part in parts[1:])
        dqs, dks, dvs = self._trade.to_tokens(parts, [by_heads, by_groups, by_groups], shares)
        dsink_H = None
        if grads.dsink_H is not None:
            dsink_H = grads.dsink_H.new_zeros(dout_THV.shape[1])
            dsink_H[own.heads] = grads.dsink_H
        return Gradients(torch.cat(dqs, 1), _summed(dks, shares), _summed(dvs, shares), dsink_H)

    def _seen(self, seen: Seen, own: Share, ids: Sequence[Tensor]) -> Seen:
        """What this rank's heads see, for all tokens of the ranks that trade."""
        every, blocks = seen.reach.of_all, None
        reach = every.once(("heads", self), lambda: _rows(every, self._trade.index_N))
        if seen.blocks is not None:
            blocks = Blocks(ids[0], seen.blocks.grid)
        sink_H = None if seen.sink_H is None else seen.sink_H[own.heads]
        return Seen(reach, blocks, seen.scale, sink_H)


def _rows(every: Reach, index_N: Tensor) -> Reach:
    """Some rows, by themselves: what belongs to a reach must not keep it alive."""
    return replace(every.rows(index_N), whole=None, index_T=None)


def _summed(parts: Sequence[Tensor], shares: Sequence[Share]) -> Tensor:
    """Gradients of all key-value heads, from ranks of which several may have the same one."""
    found: list[Tensor] = []
    last = 0
    for part, share in zip(parts, shares, strict=True):
        if share.groups.stop > last:
            found.append(part)
            last = share.groups.stop
        else:
            found[-1] = found[-1] + part
    return torch.cat(found, 1)
