"""All-gather: every rank gathers the keys and values of one head after the other.

While a rank attends with the query heads of a key-value head, the next one is on its way; no rank
has more than two of them whole.
Shapes: T local query rows (and local keys), S keys of the whole sequence, H query heads, G
key-value heads, D key dim, V value dim, R query heads of one key-value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.scoring import Gradients
from .gathering import Gathering
from .heads import Share, split_heads
from .method import Kept, Local
from .seen import Seen


class AllGather:
    """The all-gather exchange over one layout; see `Method`.

    Args:
        gathering: Over the layout.
        keeps: Whether a backward has what its forward gathered, and does not gather again.
    """

    def __init__(self, gathering: Gathering, *, keeps: bool = False) -> None:
        self._gathering, self._here, self._keeps = gathering, Local(), keeps

    def forward(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor, Kept]:
        """Output and lse over all keys."""
        outs, lses, arrived = [], [], []
        for share, k_S1D, v_S1V in self._arrivals(q_THD, k_TGD, v_TGV, into=arrived):
            of_head = seen.of(share, q_THD.shape[1], k_TGD.shape[1])
            out, lse = self._here.forward(q_THD[:, share.heads], k_S1D, v_S1V, of_head)[:2]
            outs.append(out)
            lses.append(lse)
            # Before the next head is there as well.
            del k_S1D, v_S1V
        out_THV, lse_TH = torch.cat(outs, 1), torch.cat(lses, 1)
        given = q_THD, k_TGD, v_TGV, out_THV, lse_TH, seen
        return out_THV, lse_TH, Kept(*given, arrived=tuple(arrived))

    def backward(self, dout_THV: Tensor, dlse_TH: Tensor | None, kept: Kept) -> Gradients:
        """Gathers again; dk and dv of a head return while the next one is computed."""
        q_THD, heads, groups = kept.q, kept.q.shape[1], kept.k.shape[1]
        dqs, dsinks, owned = [], [], []
        finish: Callable[[], list[Tensor]] | None = None
        for share, k_S1D, v_S1V in self._arrivals(q_THD, kept.k, kept.v, kept.arrived):
            some = share.heads
            given = q_THD[:, some], k_S1D, v_S1V, kept.out[:, some], kept.lse[:, some]
            dlse_TR = None if dlse_TH is None else dlse_TH[:, some]
            of_head = Kept(*given, kept.seen.of(share, heads, groups))
            grads = self._here.backward(dout_THV[:, some], dlse_TR, of_head)
            dqs.append(grads.dq_THD)
            dsinks.append(grads.dsink_H)
            if finish is not None:
                owned.append(finish())
            finish = self._gathering.start_sum([grads.dk_SGD, grads.dv_SGV])
            # Before the next head is there as well.
            del k_S1D, v_S1V, given, of_head, grads
        assert finish is not None
        owned.append(finish())
        dk_TGD, dv_TGV = (torch.cat(parts, 1) for parts in zip(*owned, strict=True))
        dsink_H = None if kept.seen.sink_H is None else torch.cat(dsinks)
        return Gradients(torch.cat(dqs, 1), dk_TGD, dv_TGV, dsink_H)

    def _arrivals(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGV: Tensor,
        arrived: Sequence[Tensor] = (),
        into: list[Tensor] | None = None,
    ) -> Iterator[tuple[Share, Tensor, Tensor]]:
        """Each key-value head with its query heads, its keys and its values.

        Args:
            q_THD: For the number of heads.
            k_TGD: The rank's own keys.
            v_TGV: Its own values.
            arrived: Keys and values of each head, if they are there already.
            into: Where to leave them, if they shall be kept.
        """
        groups, widths = k_TGD.shape[1], [k_TGD.shape[2], v_TGV.shape[2]]
        shares = split_heads(q_THD.shape[1], groups, groups)

        def start(share: Share) -> Callable[[], Tensor]:
            both = torch.cat([k_TGD[:, share.groups], v_TGV[:, share.groups]], -1)
            return self._gathering.start(both)

        travels = [] if arrived else shares
        coming = [start(share) for share in travels[:1]]
        for number, share in enumerate(shares, start=1):
            kv_S1X = arrived[number - 1] if arrived else coming.pop()()
            if into is not None and self._keeps:
                into.append(kv_S1X)
            # What came is gone, and only its copy in global order is there.
            coming = [start(following) for following in travels[number : number + 1]]
            k_S1D, v_S1V = kv_S1X.split(widths, -1)
            del kv_S1X
            yield share, k_S1D, v_S1V
            del k_S1D, v_S1V
