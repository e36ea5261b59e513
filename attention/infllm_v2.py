"""InfLLM-V2: long documents see blocks that their pooled keys made them choose, short ones all.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim, P windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.blocks import Blocks
from ..kernels.mirror import Mirror
from ..kernels.pool import pool
from ..kernels.pooled import Pooled
from ..kernels.reach import Reach
from ..kernels.selection import select_blocks
from ..kernels.selection_rule import SelectionRule
from .context import Context
from .documents import Documents
from .mechanism_settings import InfllmV2Settings
from .probe import Chosen, in_blocks


class InfllmV2(nn.Module):
    """One softmax over first, last and chosen blocks (InfLLM-V2, arXiv 2509.24663, section 3).

    Keys are pooled after they turned and without a gradient. The query heads of a key-value head
    choose together: their probabilities over the pooled keys are added, and a block counts as much
    as the best window that overlaps it.
    """

    needs_hidden = False

    def __init__(self, settings: InfllmV2Settings) -> None:
        super().__init__()
        self.settings = settings
        self.rule = SelectionRule(
            settings.count,
            initial=settings.initial,
            local=settings.local,
            count_forced=False,
            statistic="probability",
            heads="sum",
            mapping="overlap_max",
        )

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        q_THD, k_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        below, documents = self.settings.dense_below, ctx.documents
        dense = documents.once(("all dense", below), lambda: _all_dense(documents, below))
        if dense is not None:
            blocks = None if dense else self._choose(q_THD, k_SGD, ctx.reach, ctx)
            ctx.look(q_THD, k_SGD, None if blocks is None else in_blocks(blocks))
            return ctx.attend(q_THD, k_SGD, v_SGV, ctx.reach, blocks)[0]
        split = documents.once(("split", below), lambda: Split.of(documents, below))
        short, long = (q_THD.index_select(0, rows.on(q_THD.device)) for rows in split.rows)
        blocks = self._choose(long, k_SGD, split.reaches[1], ctx)
        ctx.look(q_THD, k_SGD, split.seen(blocks))
        outs = (
            ctx.attend(short, k_SGD, v_SGV, split.reaches[0])[0],
            ctx.attend(long, k_SGD, v_SGV, split.reaches[1], blocks)[0],
        )
        return torch.cat(outs).index_select(0, split.order.on(q_THD.device))

    def _choose(self, q_THD: Tensor, k_SGD: Tensor, reach: Reach, ctx: Context) -> Blocks:
        """The blocks that the queries choose, from keys that have turned."""
        settings, documents, k_SGD = self.settings, ctx.documents, ctx.gather(k_SGD)
        length, stride, coarse = settings.compress_length, settings.compress_stride, settings.coarse

        def pooled(times: int) -> Pooled:
            windows = documents.windows(times * length, times * stride)
            return Pooled(pool(k_SGD, windows, "mean"), windows)

        def choose() -> Blocks:
            fine = pooled(1)
            return select_blocks(
                q_THD,
                fine.k_PGD,
                fine.windows,
                documents.grid(settings.block),
                reach,
                self.rule,
                scale=ctx.scale_of(q_THD),
                coarse=pooled(coarse) if coarse else None,
            )

        return ctx.choose("blocks", choose)


@dataclass(frozen=True, eq=False)
class Split:
    """The query rows of short and of long documents.

    Attributes:
        rows: Numbers of the short and of the long documents' rows, ascending.
        reaches: Their reaches.
        order: Where each row is among the short ones followed by the long ones.
    """

    rows: tuple[Mirror, Mirror]
    reaches: tuple[Reach, Reach]
    order: Mirror

    @classmethod
    def of(cls, documents: Documents, below: int) -> Split:
        """Splits at documents of `below` tokens, the first ones that are long."""
        long_T, reach = documents.lengths() >= below, documents.reach()
        rows = [mask_T.nonzero()[:, 0] for mask_T in (~long_T, long_T)]
        order_T = torch.cat(rows).argsort()
        return cls(
            (Mirror(rows[0]), Mirror(rows[1])),
            (reach.rows(rows[0]), reach.rows(rows[1])),
            Mirror(order_T),
        )

    def seen(self, blocks: Blocks) -> Chosen:
        """What each row sees, where those of long documents chose `blocks`; for the probe."""
        short, of_long = len(self.reaches[0]), in_blocks(blocks)
        order_T = self.order.on(torch.device("cpu"))

        def chosen(row: int, first: int, last: int) -> Tensor:
            at = int(order_T[row])
            if at < short:
                return torch.ones(1, last - first, dtype=torch.bool)
            return of_long(at - short, first, last)

        return chosen


def _all_dense(documents: Documents, below: int) -> bool | None:
    """Whether all documents are shorter than `below`; None if some are and some are not.

    All documents are asked and not the rows, so that ranks with different rows of them agree.
    """
    sizes = torch.tensor(documents.cu_seqlens).diff()
    if documents.final is not None:
        sizes = torch.tensor([documents.final])
    short = sizes[sizes > 0] < below
    if bool(short.all()):
        return True
    return None if bool(short.any()) else False
