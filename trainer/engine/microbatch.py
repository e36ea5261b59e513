"""One micro-batch of this rank: its tokens, and the context that its layers attend in.

Shapes: T tokens of this context rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ...attention.context import Context
from ...attention.documents import Documents
from ...attention.notes import Notes
from ...attention.probe import Probe
from ...attention.rope import Rope
from ...kernels.blocks import Blocks
from ...parallel.exchange import Exchange
from ...parallel.layout import Layout
from ..data.samples import Sample
from .initialize import stable_seed
from .key_cache import KeyCache


@dataclass
class MicroBatch(PackedSeqParams):
    """Travels through megatron's schedules in the place of its packed-sequence parameters."""

    attention: Context = None  # type: ignore[assignment]
    nope_layers: tuple[int, ...] = ()
    tokens_T: torch.Tensor = None  # type: ignore[assignment]
    labels_T: torch.Tensor = None  # type: ignore[assignment]
    weights_T: torch.Tensor = None  # type: ignore[assignment]
    kept: dict[int, dict[str, Blocks]] = field(default_factory=dict)
    """Per layer what it chose in its first pass, until its second."""

    cache: KeyCache | None = None
    """What generation keeps of the tokens before these."""

    probe: Probe | None = None
    """Measures what layers look at, in the pass that learns."""

    def context(self, layer: int, *, training: bool, learns: bool, twice: bool) -> Context:
        """What a layer attends in.

        Args:
            layer: Counted from 0 over the whole model.
            training: Whether weights are being learned.
            learns: Whether auxiliary losses have gradients now.
            twice: Whether the layer is computed again in the backward.
        """
        rope = self.attention.rope
        return replace(
            self.attention,
            rope=replace(rope, turns=layer not in self.nope_layers),
            training=training,
            learns=learns,
            kept=self.kept.setdefault(layer, {}) if twice else None,
            layer=layer,
            probe=self.probe if learns else None,
        )


class BatchBuilder:
    """Cuts a sample to this context rank's tokens; positions, labels and reach by the layout.

    Args:
        layout: Of the micro-batch's tokens.
        rank: This context rank.
        exchange: Attention over the context ranks.
        rope: Of the stage; a micro-batch may hold several sequences, and an evaluation a shorter
            one.
        device: Where the tokens go.
        seed: What the micro-batches' random numbers are drawn from, beside their own number.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        exchange: Exchange,
        rope: Rope,
        device: torch.device,
        seed: tuple[object, ...],
    ) -> None:
        self.layout = layout
        self.index_T = layout.index(rank)
        self.exchange = exchange
        self.rope, self.device, self.seed = rope, device, seed

    def __call__(self, sample: Sample, notes: Notes | None = None) -> MicroBatch:
        """The rank's part of `sample`; what its layers note is added to `notes`."""
        index_T = self.index_T
        lengths = sample.cu_seqlens.diff().long()
        starts_T = torch.repeat_interleave(sample.cu_seqlens[:-1].long(), lengths)
        positions_T = (torch.arange(self.layout.length) - starts_T)[index_T]
        positions_T = positions_T.to(self.device)

        def local(values_T: torch.Tensor) -> torch.Tensor:
            return values_T[index_T].to(self.device, non_blocking=True)

        weights_T = local(sample.weights_T)
        context = Context(
            cp=self.exchange,
            documents=Documents(sample.cu_seqlens, None if self.layout.ranks == 1 else index_T),
            rope=self.rope,
            positions_T=positions_T,
            positions_S=positions_T,
            weights_T=weights_T,
            notes=notes or Notes(),
            draw=partial(_draw, *self.seed, sample.number),
        )
        return MicroBatch(
            qkv_format="thd",
            attention=context,
            nope_layers=self.rope.settings.nope_layers,
            tokens_T=local(sample.tokens_T),
            labels_T=local(sample.labels_T),
            weights_T=weights_T,
        )


def _draw(*key: object) -> float:
    """A number in [0, 1) for a key."""
    return stable_seed(*key) / 2**63
