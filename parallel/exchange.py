"""Exchange: exact attention of local queries over the keys of all context ranks.

Shapes: T local query rows (and local keys), S keys of the whole sequence, H query heads,
G key-value heads, D key dim, V value dim, P windows, L keys of a rank's windows, N wanted entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.blocks import Blocks
from ..kernels.mirror import Mirror
from ..kernels.reach import Reach
from ..kernels.windows import Windows
from .all_gather import AllGather
from .entries import Entries
from .fetch import Fetch
from .gathering import Gathering, gather
from .halo import Halo, Make
from .layout import Layout
from .members import Members
from .method import Kept, Local, Method
from .ring import Ring
from .route import double_ring, ring
from .seen import Seen
from .transport import Transport
from .ulysses import Ulysses

ExchangeKind = Literal["all_gather", "ring", "double_ring", "fetch", "ulysses", "two_d"]
Across = Literal["ring", "all_gather"]


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

    def gather_some(self, x_TG: Tensor, index_N: Mirror) -> Tensor:
        """Some heads of some tokens of all ranks, [N, ...], in the order in which they are wanted.

        Differentiable: the gradients of an entry are summed over the ranks. An entry that is wanted
        more than once travels once.

        Args:
            x_TG: The rank's tokens, [T, G, ...].
            index_N: The wanted entries: global position of the token * G + head; the same ones on
                all ranks.
        """
        gathering = self._gathering
        if gathering is None:
            return x_TG.flatten(0, 1).index_select(0, index_N.on(x_TG.device))
        groups = x_TG.shape[1]
        entries = index_N.once(
            ("entries", self, groups), lambda: Entries(index_N.host, groups, gathering)
        )
        return entries.gather(x_TG)

    def pooled(self, x_T: Tensor, windows: Windows, make: Make) -> Tensor:
        """What is made of each window of tokens, [P, ...], for all ranks.

        Every rank makes what belongs to the windows that begin in its tokens. Where they end in
        tokens of others, these come first. Differentiable: the gradients of a window are summed
        over the ranks before they go through `make`, once, at its owner.

        Args:
            x_T: One entry for each of the rank's tokens.
            windows: Of the whole sequence.
            make: From the keys [L, ...] of some windows, and these windows, numbered within them,
                one entry for each window. Of no windows, an empty tensor that has the dimensions,
                the dtype and the way back to `x_T` of any other.
        """
        gathering = self._gathering
        if gathering is None:
            return make(x_T, windows)
        return windows.once(("halo", self), lambda: Halo.of(windows, gathering)).pooled(x_T, make)

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

        Differentiable in all tensors. Keeps what the method attended with, see `Kept`.

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
    kind: ExchangeKind,
    layout: Layout,
    transport: Transport | None = None,
    *,
    inner: int = 1,
    across: Across = "ring",
    keeps: bool = False,
) -> Exchange:
    """The exchange of one rank.

    Args:
        kind: How keys and values meet queries.
            `all_gather`: every rank gathers the keys of one head after the other.
            `ring`: shards of keys go round while the one before is computed.
            `double_ring`: they go round inside of a node, and meanwhile on to the next one.
            `fetch`: every rank receives the keys that some of its queries reach, and no others.
            `ulysses`: ranks trade tokens for heads and back.
            `two_d`: neighbours trade heads, and then attend across nodes.
        layout: Which tokens each rank owns.
        transport: The network between the ranks; may be None if there is one rank.
        inner: Of `double_ring` and `two_d`: neighbouring ranks that share a node. A divisor of the
            ranks.
        across: Of `two_d`: the exchange between nodes.
        keeps: Whether a backward has the other ranks' keys and values of its forward: they do not
            travel again, and a rank holds those of the whole sequence. (Of its heads in `two_d`;
            `ulysses` always has its heads'.)
    """
    if layout.ranks == 1:
        return Exchange(Local())
    assert transport is not None and transport.size == layout.ranks, (layout.ranks, transport)
    assert layout.ranks % inner == 0, (layout.ranks, inner)
    gathering = Gathering(layout, transport)
    makers: dict[ExchangeKind, Callable[[], Method]] = {
        "all_gather": lambda: AllGather(gathering, keeps=keeps),
        "ring": lambda: Ring(layout, transport, ring(layout.ranks), keeps=keeps),
        "double_ring": lambda: Ring(
            layout, transport, double_ring(layout.ranks, inner), keeps=keeps
        ),
        "fetch": lambda: Fetch(layout, transport, keeps=keeps),
        "ulysses": lambda: _ulysses(layout, transport, layout.ranks, "ring", keeps),
        "two_d": lambda: _ulysses(layout, transport, inner, across, keeps),
    }
    return Exchange(makers[kind](), gathering)


def _ulysses(
    layout: Layout, transport: Transport, inner: int, across: Across, keeps: bool
) -> Method:
    """Neighbours trade heads; ranks with the same ones attend over the tokens of all nodes."""
    node, place = divmod(transport.rank, inner)
    members = range(node * inner, (node + 1) * inner)
    method: Method = Local()
    if inner < layout.ranks:
        nodes = layout.ranks // inner
        joined = layout.joined(range(n * inner, (n + 1) * inner) for n in range(nodes))
        peers = Members(transport, range(place, layout.ranks, inner))
        if across == "all_gather":
            method = AllGather(Gathering(joined, peers), keeps=keeps)
        else:
            method = Ring(joined, peers, ring(nodes), keeps=keeps)
    index = [layout.index(rank) for rank in members]
    return Ulysses(Members(transport, members), index, method)


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
        out_THV, lse_TH, kept = method.forward(q_THD, k_TGD, v_TGV, seen)
        ctx.save_for_backward(*kept.tensors)
        ctx.method, ctx.rest = method, kept.rest
        ctx.dtypes = [x.dtype for x in (q_THD, k_TGD, v_TGV)]
        ctx.set_materialize_grads(False)
        return out_THV, lse_TH

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept = Kept.of(ctx.saved_tensors, ctx.rest)
        method: Method = ctx.method
        dout_THV, dlse_TH = grad_outputs
        if dout_THV is None:
            if dlse_TH is None:
                return (None,) * 8
            dout_THV = kept.q.new_zeros(*dlse_TH.shape, kept.v.shape[-1])
        grads = method.backward(dout_THV, dlse_TH, kept)
        q, k, v = (grad.to(dtype) for grad, dtype in zip(grads[:3], ctx.dtypes, strict=True))
        dsink_H = None
        if grads.dsink_H is not None:
            assert kept.seen.sink_H is not None
            dsink_H = grads.dsink_H.to(kept.seen.sink_H.dtype)
        return q, k, v, dsink_H, None, None, None, None
