"""One micro-batch of this rank: its tokens, and the context that its layers attend in.

Shapes: T tokens of this context rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ...attention.context import Context
from ...attention.rope import NoRotation, RotaryTable
from ...attention.settings import RopeSettings
from ...kernels.reach import Reach
from ...parallel.exchange import Exchange
from ...parallel.layout import Layout
from ..data.samples import Sample


@dataclass
class MicroBatch(PackedSeqParams):
    """Travels through megatron's schedules in the place of its packed-sequence parameters."""

    attention: Context = None  # type: ignore[assignment]
    unturned: Context = None  # type: ignore[assignment]
    """The same without RoPE, for `nope_layers`."""

    nope_layers: tuple[int, ...] = ()
    tokens_T: torch.Tensor = None  # type: ignore[assignment]
    labels_T: torch.Tensor = None  # type: ignore[assignment]
    weights_T: torch.Tensor = None  # type: ignore[assignment]

    def context(self, layer: int) -> Context:
        """What a layer attends in.

        Args:
            layer: Counted from 0 over the whole model.
        """
        return self.unturned if layer in self.nope_layers else self.attention


class BatchBuilder:
    """Cuts a sample to this context rank's tokens; positions, labels and reach by the layout.

    Args:
        layout: Of the micro-batch's tokens.
        rank: This context rank.
        exchange: Attention over the context ranks.
        rope: Of the stage.
        length: Tokens in a sequence of the stage, by which RoPE is chosen; a micro-batch may hold
            several sequences, and an evaluation a shorter one.
        head_width: Channels of one head.
        device: Where the tokens go.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        exchange: Exchange,
        rope: RopeSettings,
        length: int,
        head_width: int,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.index_T = layout.index(rank)
        self.exchange = exchange
        self.rope, self.length, self.head_width = rope, length, head_width
        self.device = device

    def __call__(self, sample: Sample) -> MicroBatch:
        """The rank's part of `sample`."""
        index_T = self.index_T
        lengths = sample.cu_seqlens.diff().long()
        starts_T = torch.repeat_interleave(sample.cu_seqlens[:-1].long(), lengths)
        positions_T = (torch.arange(self.layout.length) - starts_T)[index_T]
        positions_T = positions_T.to(self.device)
        context = Context(
            cp=self.exchange,
            reach=Reach.documents(sample.cu_seqlens).rows(index_T),
            rope=RotaryTable.build(positions_T, self.rope, self.head_width, self.length),
            positions_T=positions_T,
        )

        def local(values_T: torch.Tensor) -> torch.Tensor:
            return values_T[index_T].to(self.device, non_blocking=True)

        return MicroBatch(
            qkv_format="thd",
            attention=context,
            unturned=replace(context, rope=NoRotation()),
            nope_layers=self.rope.nope_layers,
            tokens_T=local(sample.tokens_T),
            labels_T=local(sample.labels_T),
            weights_T=local(sample.weights_T),
        )
