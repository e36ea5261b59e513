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
from ..kernels.reach import Reach
from .all_gather import AllGather
from .layout import Layout
from .ring import Ring
from .transport import Transport

ExchangeKind = Literal["ring", "all_gather"]


class Method(Protocol):
    """How keys and values travel; forward and backward are explicit, without autograd."""

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, reach: Reach, scale: float
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
        reach: Reach,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of the local queries, keys and values, in the accumulators' dtype."""
        ...


class Local:
    """One rank: nothing travels."""

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, reach: Reach, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of the only shard."""
        return attend(q_THD, k_TGD, v_TGV, reach, scale=scale)

    def backward(
        self,
        dout_THV: Tensor,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        out_THV: Tensor,
        lse_TH: Tensor,
        reach: Reach,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the only shard."""
        grads = attend_backward(dout_THV, q_THD, k_TGD, v_TGV, out_THV, lse_TH, reach, scale=scale)
        return grads[:3]


class Exchange:
    """Attention over a sequence that is spread over ranks; with one rank, local and free."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def attend(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, reach: Reach, *, scale: float
    ) -> Tensor:
        """Exact attention over the whole sequence: local queries in, local output out.

        Differentiable. Keeps q, k, v, the output and the lse for the backward, all local.

        Args:
            q_THD: The rank's queries.
            k_TGD: The rank's keys, in ascending global order as its layout says.
            v_TGV: The rank's values.
            reach: For each local query the visible keys, as global positions.
            scale: Of the scores.

        Returns:
            The output [T, H, V] in the queries' dtype.
        """
        return _Attend.apply(q_THD, k_TGD, v_TGV, self._method, reach, scale)


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
    return Exchange(Ring(layout, transport) if kind == "ring" else AllGather(layout, transport))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        method: Method,
        reach: Reach,
        scale: float,
    ) -> Tensor:
        out_THV, lse_TH = method.forward(q_THD, k_TGD, v_TGV, reach, scale)
        ctx.save_for_backward(q_THD, k_TGD, v_TGV, out_THV, lse_TH)
        ctx.method, ctx.reach, ctx.scale = method, reach, scale
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = ctx.method.backward(*grad_outputs, *saved, ctx.reach, ctx.scale)
        q, k, v = (grad.to(x.dtype) for grad, x in zip(grads, saved, strict=False))
        return q, k, v, None, None, None
