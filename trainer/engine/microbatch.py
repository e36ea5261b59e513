"""One micro-batch of this rank: its tokens, and the context that its layers attend in.

Shapes: S tokens of the micro-batch, T of them this context rank's, R rows of its buffers: its
tokens, and spare ones after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from ...attention.context import Context
from ...attention.documents import Documents
from ...attention.notes import Notes
from ...attention.probe import Probe
from ...attention.rope import Rope
from ...kernels.blocks import Blocks
from ...kernels.transfer import to_device
from ..data.samples import Sample
from .initialize import stable_seed
from .key_cache import KeyCache
from .place import Places


@dataclass
class MicroBatch(PackedSeqParams):
    """Travels through megatron's schedules in the place of its packed-sequence parameters."""

    attention: Context = None  # type: ignore[assignment]
    nope_layers: tuple[int, ...] = ()
    tokens_R: torch.Tensor = None  # type: ignore[assignment]
    labels_R: torch.Tensor = None  # type: ignore[assignment]
    weights_R: torch.Tensor = None  # type: ignore[assignment]
    """Of spare rows tokens, labels and weights are 0."""

    spare_1R: torch.Tensor | None = None
    """Which rows are spare; None if no context rank has any."""

    kept: dict[int, dict[str, Blocks]] = field(default_factory=dict)
    """Per layer what it chose in its first pass, until its second."""

    cache: KeyCache | None = None
    """What generation keeps of the tokens before these."""

    probe: Probe | None = None
    """Measures what layers look at, in the pass that learns."""

    @property
    def tokens(self) -> int:
        """This context rank's tokens: the first rows."""
        return len(self.attention.positions_T)

    def own(self, x_R: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor that are tokens."""
        # A slice of everything would be copied in the backward.
        return x_R if len(x_R) == self.tokens else x_R[: self.tokens]

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
    """Cuts samples to this context rank's tokens; positions, labels and reach by the layout.

    Args:
        places: Which tokens are this rank's.
        rope: Of the stage; a micro-batch may hold several sequences, and an evaluation a shorter
            one.
        device: Where the tokens go.
        seed: What the micro-batches' random numbers are drawn from, beside their own number.
    """

    def __init__(
        self, places: Places, rope: Rope, device: torch.device, seed: tuple[object, ...]
    ) -> None:
        self.places = places
        self.rope, self.device, self.seed = rope, device, seed

    def __call__(self, sample: Sample, notes: Notes | None = None) -> MicroBatch:
        """The rank's part of `sample`; what its layers note is added to `notes`."""
        place = self.places.of(sample.cu_seqlens)
        index_T, rows = place.index_T, place.rows
        tokens = len(index_T)
        lengths = sample.cu_seqlens.diff().long()
        starts_T = torch.repeat_interleave(sample.cu_seqlens[:-1].long(), lengths)
        positions_S = torch.arange(place.layout.length) - starts_T
        positions_T = to_device(positions_S[index_T], self.device)

        def local(values_S: torch.Tensor) -> torch.Tensor:
            own_R = F.pad(values_S[index_T], (0, rows - tokens))
            return to_device(own_R, self.device)

        weights_R = local(sample.weights_T)
        context = Context(
            cp=place.exchange,
            documents=Documents(sample.cu_seqlens, None if place.layout.ranks == 1 else index_T),
            rope=self.rope,
            positions_T=positions_T,
            positions_S=positions_T,
            weights_T=weights_R[:tokens],
            notes=notes or Notes(),
            draw=partial(_draw, *self.seed, sample.number),
        )
        spare_1R = None
        if place.spare:
            spare_1R = to_device((torch.arange(rows) >= tokens)[None], self.device)
        return MicroBatch(
            qkv_format="thd",
            attention=context,
            nope_layers=self.rope.settings.nope_layers,
            tokens_R=local(sample.tokens_T),
            labels_R=local(sample.labels_T),
            weights_R=weights_R,
            spare_1R=spare_1R,
        )


def _draw(*key: object) -> float:
    """A number in [0, 1) for a key."""
    return stable_seed(*key) / 2**63
