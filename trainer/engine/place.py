"""Place: which tokens of a micro-batch this context rank has, and how it reaches the others'.

Shapes: T tokens of this context rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...parallel.exchange import Exchange, make_exchange
from ...parallel.layout import Layout, balanced_layout, make_layout
from ...parallel.settings import ParallelSettings
from ...parallel.transport import Transport
from ..exchange_choice import ExchangeChoice


@dataclass(frozen=True, eq=False)
class Place:
    """One layout as this rank sees it.

    Attributes:
        layout: Which tokens each context rank owns.
        index_T: Positions of this rank's tokens among all, ascending, int64 on the host.
        exchange: Attention over the context ranks.
        rows: Rows of every rank's buffers, as megatron wants equal shapes: first the rank's
            tokens, then spare ones.
    """

    layout: Layout
    index_T: torch.Tensor
    exchange: Exchange
    rows: int

    @property
    def spare(self) -> bool:
        """Whether any context rank has spare rows."""
        return self.rows * self.layout.ranks > self.layout.length


class Places:
    """The place of each micro-batch, by its documents.

    Args:
        parallel: Of the stage.
        choice: The exchange of its context ranks.
        rank: This context rank.
        transport: Between the context ranks; may be None if there is one.
        pairs: The visible (query, key) pairs of a document's first tokens, by their number.
    """

    def __init__(
        self,
        parallel: ParallelSettings,
        choice: ExchangeChoice,
        rank: int,
        transport: Transport | None,
        pairs: Callable[[int], float],
    ) -> None:
        self._parallel, self._choice, self._rank = parallel, choice, rank
        self._transport, self._pairs = transport, pairs
        self._of_length = lru_cache(maxsize=16)(self._make_of_length)
        # An evaluation asks for a sample's place again, soon.
        self._of_documents = lru_cache(maxsize=4)(self._make_of_documents)

    def of(self, cu_seqlens: torch.Tensor) -> Place:
        """The place of a micro-batch, the same object for one of the same layout if it is known.

        Args:
            cu_seqlens: Boundaries of its documents, ascending from 0, on the host.
        """
        bounds = cu_seqlens.tolist()
        if self._parallel.layout == "balanced" and self._parallel.context > 1:
            return self._of_documents(tuple(bounds))
        return self._of_length(bounds[-1])

    def rows(self, length: int) -> int:
        """Rows of every context rank's buffers for a micro-batch of `length` tokens."""
        rows = -(-length // self._parallel.context)
        # Tensor ranks split them equally.
        multiple = self._parallel.tensor if self._parallel.sequence else 1
        return -(-rows // multiple) * multiple

    def _make_of_length(self, length: int) -> Place:
        kind, ranks = self._parallel.layout, self._parallel.context
        return self._place(make_layout("zigzag" if kind == "balanced" else kind, length, ranks))

    def _make_of_documents(self, bounds: tuple[int, ...]) -> Place:
        return self._place(balanced_layout(bounds, self._parallel.context, self._pairs))

    def _place(self, layout: Layout) -> Place:
        rows = self.rows(layout.length)
        assert layout.largest <= rows, (layout.sizes, rows)
        exchange = make_exchange(
            self._choice.kind,
            layout,
            self._transport,
            inner=self._choice.inner,
            across=self._choice.across,
            keeps=self._parallel.keep_keys,
        )
        return Place(layout, layout.index(self._rank), exchange, rows)
