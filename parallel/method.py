"""Method: how queries meet keys and values; what an exchange is made of.

Shapes: T local query rows (and local keys), H query heads, G key-value heads, D key dim, V value
dim. Of what is kept, N query rows, S keys, and the heads may be fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ..kernels.attend import attend, attend_backward
from ..kernels.scoring import Gradients
from .heads import Share
from .seen import Seen


@dataclass(frozen=True, eq=False)
class Kept:
    """What a backward needs of its forward, in the form in which the forward attended.

    Attributes:
        q: Queries [N, H, D].
        k: Keys [S, G, D].
        v: Values [S, G, V].
        out: Their output [N, H, V], over all keys.
        lse: Its lse [N, H].
        seen: What was seen.
        shares: The heads of each rank, where ranks have divided them.
        arrived: What came from other ranks, where it is not to come again.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    seen: Seen
    shares: tuple[Share, ...] = ()
    arrived: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors that a gradient depends on."""
        return self.q, self.k, self.v, self.out, self.lse, self.seen.sink_H, *self.arrived

    @property
    def rest(self) -> tuple[Seen, tuple[Share, ...]]:
        """All that is no such tensor."""
        return replace(self.seen, sink_H=None), self.shares

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], rest: tuple[Seen, tuple[Share, ...]]) -> Kept:
        """What these two came from."""
        q, k, v, out, lse, sink_H, *arrived = tensors
        seen, shares = rest
        return cls(q, k, v, out, lse, replace(seen, sink_H=sink_H), shares, tuple(arrived))


class Method(Protocol):
    """Forward and backward are explicit, without autograd."""

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output [T, H, V] in the queries' dtype and lse [T, H], over the whole sequence."""
        ...

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Gradients of the local queries, keys and values.

        They are in the accumulators' dtype, unless they are complete and have crossed the wire.
        """
        ...


class Local:
    """One rank: nothing travels."""

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output and lse of the only shard."""
        how = {"scale": seen.scale, "sink_H": seen.sink_H}
        out_THV, lse_TH = attend(q_THD, k_TGD, v_TGV, seen.reach, seen.blocks, **how)
        return out_THV, lse_TH, Kept(q_THD, k_TGD, v_TGV, out_THV, lse_TH, seen)

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Gradients of the only shard."""
        seen = kept.seen
        given = kept.q, kept.k, kept.v, kept.out, kept.lse, seen.reach, seen.blocks
        how = {"scale": seen.scale, "sink_H": seen.sink_H, "dlse_TH": dlse_TH}
        return attend_backward(dout_THV, *given, **how)
