"""Context: what a mechanism knows about the micro-batch that it works on.

Shapes: T query rows of this rank, S its keys (those of the same tokens, but for generation, where
the queries are the last tokens), H query heads, G key-value heads, D key dim, V value dim, E
channels, P windows, L keys of a rank's windows, N wanted entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.mirror import Mirror
from ..kernels.reach import Reach
from ..kernels.transfer import to_device
from ..kernels.windows import Windows
from ..parallel.exchange import Exchange
from ..parallel.halo import Make
from .documents import Documents
from .notes import Notes
from .probe import Chosen, Probe
from .rope import Rope, Rotation


@dataclass(frozen=True, eq=False)
class Context:
    """One micro-batch of packed documents, as one layer of this rank sees it.

    Attributes:
        cp: Attention over all context ranks.
        documents: The packed documents.
        rope: How positions enter queries and keys.
        positions_T: Position of each query within its document, int64.
        positions_S: Position of each key; the same tensor where queries and keys are one's tokens.
        weights_T: Loss weight of each query's token; auxiliary losses are sums weighted by it.
        notes: Where losses and observations are left.
        training: Whether weights are being learned; false in evaluations.
        learns: Whether auxiliary losses have gradients now. Not in the first pass of a layer that
            is computed again in the backward.
        draw: A number in [0, 1) for a name; the same on all ranks that share the micro-batch, and
            in every attempt.
        kept: What the layer chose in its first pass, for the second; None if there is one pass.
        layer: Number of the layer, from 0 over the whole model.
        probe: Measures what the layer looks at; None most of the time.
        scale: Of the scores; None for 1 / sqrt(D).
        sink_H: The learned score per head with nothing behind it.
    """

    cp: Exchange
    documents: Documents
    rope: Rope
    positions_T: Tensor
    positions_S: Tensor
    weights_T: Tensor
    notes: Notes
    training: bool = True
    learns: bool = True
    draw: Callable[[str], float] = lambda name: 0.0
    kept: dict[str, Blocks] | None = None
    layer: int = 0
    probe: Probe | None = None
    scale: float | None = None
    sink_H: Tensor | None = None

    @property
    def reach(self) -> Reach:
        """Causal attention inside each document."""
        return self.documents.reach()

    def attend(
        self,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        reach: Reach,
        blocks: Blocks | None = None,
        *,
        sinks: bool = True,
        here: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the whole sequence, see `Exchange.attend`, with the layer's options.

        Args:
            q_THD: Queries, turned.
            k_SGD: Keys, turned.
            v_SGV: Values.
            reach: The keys that each query sees.
            blocks: The blocks that each query chose; None for all.
            sinks: False leaves the learned sinks out.
            here: Whether every rank has all of these keys.
        """
        sink_H = self.sink_H if sinks else None
        scale = self.scale_of(q_THD)
        how = {"scale": scale, "sink_H": sink_H, "here": here}
        return self.cp.attend(q_THD, k_SGD, v_SGV, reach, blocks, **how)

    def gather(self, x_T: Tensor) -> Tensor:
        """The tokens of all ranks; what one rank, or a cache, has of them is all of them."""
        return self.cp.gather(x_T)

    def gather_some(self, x_SG: Tensor, index_N: Mirror) -> Tensor:
        """Some heads of some tokens of all ranks, [N, ...]; see `Exchange.gather_some`.

        Args:
            x_SG: This rank's, [S, G, ...].
            index_N: Position of the token among all tokens * G + head, the same on all ranks.
        """
        return self.cp.gather_some(x_SG, index_N)

    def pooled(self, x_S: Tensor, windows: Windows, make: Make) -> Tensor:
        """What is made of all windows of tokens, [P, ...], each by its owner.

        What one rank, or a cache, has of the tokens is all of them.

        Args:
            x_S: This rank's, [S, ...].
            windows: Of all tokens.
            make: Makes an entry of each window, from keys [L, ...] and windows numbered within
                them; see `Exchange.pooled`.
        """
        return self.cp.pooled(x_S, windows, make)

    def scale_of(self, q_THD: Tensor) -> float:
        """The scale of the scores."""
        return q_THD.shape[-1] ** -0.5 if self.scale is None else self.scale

    def turn_queries(self, q_THD: Tensor) -> Tensor:
        """Queries with their positions."""
        return self._turning("T", self.positions_T, q_THD).apply(q_THD)

    def turn_keys(self, k_SGD: Tensor) -> Tensor:
        """Keys with their positions."""
        name = "T" if self.positions_S is self.positions_T else "S"
        return self._turning(name, self.positions_S, k_SGD).apply(k_SGD)

    def turning(
        self, name: str, positions: Callable[[], Tensor], x: Tensor, share: float | None = None
    ) -> Rotation:
        """A rotation by other positions, made once per micro-batch.

        Args:
            name: Tells the positions from others.
            positions: Makes them, int64 [N] within the document, on any device.
            x: [N, heads, dim], for its dim and device.
            share: Of the channels that turn; None for the share of the model.
        """
        key = name, x.shape[-1], x.device, self.rope.turns, share
        return self.documents.once(
            key, lambda: self.rope.at(to_device(positions(), x.device), x.shape[-1], share)
        )

    def _turning(self, name: str, positions: Tensor, x: Tensor) -> Rotation:
        return self.turning(name, lambda: positions, x)

    def of_rows(self, x_SE: Tensor) -> Tensor:
        """The rows of a tensor over all keys that belong to the queries."""
        index_T = self.documents.index_T
        if index_T is None or len(x_SE) == len(index_T):
            return x_SE
        key = "rows", x_SE.device
        there_T = self.documents.once(key, lambda: to_device(index_T, x_SE.device))
        return x_SE.index_select(0, there_T)

    def look(self, q_THD: Tensor, k_SGD: Tensor, chosen: Chosen | None = None) -> None:
        """Have the probe, if there is one, compare what queries see with full attention.

        Args:
            q_THD: Turned queries.
            k_SGD: Turned keys.
            chosen: Which keys a row sees, such as `in_blocks(blocks)`; None for all in reach.
        """
        if self.probe is not None:
            how = self.reach, self.scale_of(q_THD), self.sink_H, chosen, self.weights_T
            self.probe.look(self.layer, q_THD, self.gather(k_SGD), *how)

    def measure(self, measure: str, value: Tensor) -> None:
        """Have the probe, if there is one, note a mean over rows, or a number; see `MEASURES`."""
        if self.probe is not None:
            self.probe.add(self.layer, measure, value, len(value) if value.ndim else 1)

    def choose(self, name: str, make: Callable[[], Blocks]) -> Blocks:
        """What `make` chooses; in the second pass of a layer what it chose in the first.

        Args:
            name: Tells the choices of a layer apart.
            make: Chooses.
        """
        if self.kept is None:
            return make()
        if torch.is_grad_enabled() and name in self.kept:
            return self.kept.pop(name)
        blocks = make()
        if not torch.is_grad_enabled():
            self.kept[name] = replace(blocks)  # without what attention made of it and caches
        return blocks
