"""Exchange: exact attention of local queries over the keys of all context ranks.

Shapes: T local query rows (and local keys), S keys of the whole sequence, H query heads,
G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.attend import attend, attend_backward
from ..kernels.blocks import Blocks
from ..kernels.reach import Reach
from ..kernels.scoring import Gradients
from .all_gather import AllGather
from .gathering import Gathering, gather
from .layout import Layout
from .ring import Ring
from .seen import Seen
from .transport import Transport

ExchangeKind = Literal["ring", "all_gather"]


class Method(Protocol):
    """How keys and values travel; forward and backward are explicit, without autograd."""

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, V] in the queries' dtype and lse [T, H], over the whole sequence."""
        ...

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
        """Gradients of the local queries, keys and values, in the accumulators' dtype."""
        ...


class Local:
    """One rank: nothing travels."""

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of the only shard."""
        how = {"scale": seen.scale, "sink_H": seen.sink_H}
        return attend(q_THD, k_TGD, v_TGV, seen.reach, seen.blocks, **how)

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
        """Gradients of the only shard."""
        given = dout_THV, q_THD, k_TGD, v_TGV, out_THV, lse_TH, seen.reach, seen.blocks
        how = {"scale": seen.scale, "sink_H": seen.sink_H, "dlse_TH": dlse_TH}
        return attend_backward(*given, **how)


class Exchange:
    """Attention over a sequence that is spread over ranks; with one rank, local and free."""

    def __init__(self, method: Method, gathering: Gathering | None = None) -> None:
        self._method, self._gathering = method, gathering
        self._here = Local()

    def gather(self, x_T: Tensor) -> Tensor:
        """All ranks' tokens in global order, [S, ...].

        Differentiable: the gradients of a token are summed over the ranks.

        Args:
            x_T: One entry for each of the rank's tokens.
        """
        return x_T if self._gathering is None else gather(x_T, self._gathering)

    def attend(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        reach: Reach,
        blocks: Blocks | None = None,
        *,
        scale: float,
        sink_H: Tensor | None = None,
        here: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Exact attention over the whole sequence: local queries in, local output out.

        Differentiable in all tensors. Keeps q, k, v, the output and the lse, all local.

        Args:
            q_THD: The rank's queries.
            k_TGD: The rank's keys, in ascending global order as its layout says.
            v_TGV: The rank's values.
            reach: For each local query the visible keys, as global positions.
            blocks: The blocks that each local query chose; None for all that it reaches.
            scale: Of the scores.
            sink_H: The score of one more key per head, with value 0.
            here: Whether every rank has all of these keys, and the reach counts them.

        Returns:
            The output [T, H, V] in the queries' dtype, and its lse [T, H].
        """
        method = self._here if here else self._method
        return _Attend.apply(q_THD, k_TGD, v_TGV, sink_H, method, reach, blocks, scale)


def make_exchange(
    kind: ExchangeKind, layout: Layout, transport: Transport | None = None
) -> Exchange:
    """The exchange of one rank.

    Args:
        kind: `ring`: shards of keys and values go round while the one before is computed.
            `all_gather`: every rank gathers all keys and values, then attends once.
        layout: Which tokens each rank owns.
        transport: The network between the ranks; may be None if there is one rank.
    """
    if layout.ranks == 1:
        return Exchange(Local())
    assert transport is not None and transport.size == layout.ranks, (layout.ranks, transport)
    gathering = Gathering(layout, transport)
    method = Ring(layout, transport) if kind == "ring" else AllGather(gathering)
    return Exchange(method, gathering)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        sink_H: Tensor | None,
        method: Method,
        reach: Reach,
        blocks: Blocks | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        seen = Seen(reach, blocks, scale, sink_H)
        out_THV, lse_TH = method.forward(q_THD, k_TGD, v_TGV, seen)
        ctx.save_for_backward(q_THD, k_TGD, v_TGV, out_THV, lse_TH, sink_H)
        ctx.method, ctx.asked = method, (reach, blocks, scale)
        ctx.set_materialize_grads(False)
        return out_THV, lse_TH

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGV, out_THV, lse_TH, sink_H = ctx.saved_tensors
        method: Method = ctx.method
        dout_THV, dlse_TH = grad_outputs
        if dout_THV is None:
            dout_THV = torch.zeros_like(out_THV)
        inputs = q_THD, k_TGD, v_TGV
        reach, blocks, scale = ctx.asked
        seen = Seen(reach, blocks, scale, sink_H)
        grads = method.backward(dout_THV, *inputs, out_THV, lse_TH, dlse_TH, seen)
        q, k, v = (grad.to(x.dtype) for grad, x in zip(grads[:3], inputs, strict=True))
        dsink_H = None
        if grads.dsink_H is not None:
            dsink_H = grads.dsink_H.to(sink_H.dtype)
        return q, k, v, dsink_H, None, None, None, None
