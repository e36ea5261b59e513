"""Mechanism: the part of a layer between its projections; made from the settings.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from .context import Context
from .dense import Dense
from .indexer import Indexer
from .infllm_v2 import InfllmV2
from .mechanism_settings import MechanismSettings
from .moba import Moba
from .nsa import Nsa
from .seer import Seer
from .sharded_heads import ShardedHeads
from .site import Site
from .ssa import Ssa
from .window import Window


class Mechanism(Protocol):
    """An `nn.Module` that decides which keys each query sees; it knows nothing of ranks.

    Queries and keys are those of this rank's tokens; in generation queries are the last ones'.

    Attributes:
        needs_hidden: Whether it reads the layer's normalised input.
    """

    needs_hidden: bool

    def __call__(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V] from queries and keys before RoPE."""
        ...


def make_mechanism(settings: MechanismSettings, site: Site) -> nn.Module:
    """The mechanism that the settings name.

    Args:
        settings: Of the layer.
        site: Where it works.
    """
    makers: dict[str, Any] = {
        "dense": lambda settings, site: Dense(),
        "window": lambda settings, site: Window(settings),
        "infllm_v2": lambda settings, site: InfllmV2(settings),
        "moba": lambda settings, site: Moba(settings),
        "sharded_heads": ShardedHeads,
        "ssa": Ssa,
        "nsa": Nsa,
        "indexer": Indexer,
        "seer": Seer,
    }
    return makers[settings.kind](settings, site)
