"""InfLLM-V2: long documents see blocks that their pooled keys made them choose, short ones all.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim, P windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.blocks import Blocks
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
        blocks = self._choose(q_THD, k_SGD, split.long, ctx)
        ctx.look(q_THD, k_SGD, split.seen(blocks))
        short_THV, _ = ctx.attend(q_THD, k_SGD, v_SGV, split.short)
        long_THV, _ = ctx.attend(q_THD, k_SGD, v_SGV, split.long, blocks)
        # A row that sees nothing, or a sink alone, has output 0.
        return short_THV + long_THV

    def _choose(self, q_THD: Tensor, k_SGD: Tensor, reach: Reach, ctx: Context) -> Blocks:
        """The blocks that the queries choose, from keys that have turned."""
        settings, documents = self.settings, ctx.documents
        length, stride, coarse = settings.compress_length, settings.compress_stride, settings.coarse

        def pooled(times: int) -> Pooled:
            windows = documents.windows(times * length, times * stride)
            mean = ctx.pooled(k_SGD.detach(), windows, lambda k, some: pool(k, some, "mean"))
            return Pooled(mean, windows)

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
    """What the query rows see, apart for short and for long documents.

    Attributes:
        short: The reach of the rows of short documents; those of long ones see nothing.
        long: The other way round.
    """

    short: Reach
    long: Reach

    @classmethod
    def of(cls, documents: Documents, below: int) -> Split:
        """Splits at documents of `below` tokens, the first ones that are long."""

        def part(of_long: bool) -> Reach:
            return documents.restricted(
                ("part", below, of_long), lambda every: _part(every, below, of_long)
            )

        return cls(part(False), part(True))

    def seen(self, blocks: Blocks) -> Chosen:
        """What each row sees, where those of long documents chose `blocks`; for the probe."""
        long_T, of_long = self.long.first_T < self.long.last_T, in_blocks(blocks)

        def chosen(row: int, first: int, last: int) -> Tensor:
            if long_T[row]:
                return of_long(row, first, last)
            return torch.ones(1, last - first, dtype=torch.bool)

        return chosen


def _part(documents: Documents, below: int, of_long: bool) -> Reach:
    """What the rows of long documents see, or those of short ones; the others nothing."""
    reach, hidden_T = documents.reach(), (documents.lengths() >= below) != of_long
    return Reach(reach.first_T, torch.where(hidden_T, reach.first_T, reach.last_T))


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
