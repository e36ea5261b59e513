"""ContextLoad: how evenly the context ranks share a step's attention."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..attention.pairs import prefix_pairs
from ..parallel.heads import split_heads
from ..parallel.imbalance import loads_of
from ..parallel.layout import Layout
from .exchange_choice import ExchangeChoice
from .parameters import layer_shape
from .settings import ModelSettings, StageSettings


class ContextLoad:
    """Attention of the busiest context rank over that of the mean one, in visible pairs.

    Where an exchange trades tokens for heads, a team of ranks has all tokens of its members, and
    each of them some heads.

    Args:
        model: The model.
        stage: The stage.
        choice: The exchange of its context ranks.
    """

    def __init__(self, model: ModelSettings, stage: StageSettings, choice: ExchangeChoice) -> None:
        mechanisms, shape = stage.attention.mechanisms(model.layers), layer_shape(model)
        self._pairs = prefix_pairs(mechanisms, shape.heads, shape.groups)
        self._ranks, tensor = stage.parallel.context, stage.parallel.tensor
        teams = {"ulysses": self._ranks, "two_d": choice.inner}
        self._team = teams.get(choice.kind, 1)
        heads = shape.heads // tensor
        shares = split_heads(heads, shape.groups // tensor, self._team)
        self._widest = max(share.widths[0] for share in shares) / heads

    def imbalance(self, batches: Iterable[tuple[Layout, Tensor]]) -> float | None:
        """Of a step: ranks wait for the busiest one in every micro-batch.

        Args:
            batches: Of each micro-batch the layout, and the boundaries of its documents.

        Returns:
            1 for equal shares, the number of ranks if one does it all; None if there is one.
        """
        if self._ranks == 1:
            return None
        firsts = range(0, self._ranks, self._team)
        teams = [range(first, first + self._team) for first in firsts]
        busiest = total = 0.0
        for layout, cu_seqlens in batches:
            loads = loads_of(layout.joined(teams), cu_seqlens, self._pairs)
            busiest += max(loads) * self._widest
            total += sum(loads)
        return busiest * self._ranks / total
