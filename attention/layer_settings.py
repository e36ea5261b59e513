"""Which mechanism each layer of a stage has, and the options that go with any of them. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..settings import Length, Settings
from .mechanism_settings import DenseSettings, MechanismSettings


class LayerRule(Settings):
    """Layers that have another mechanism than the others; exactly one way to name them."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Numbers, from 0."""

    every: int | None = Field(default=None, ge=2)
    """Every n-th layer: with 4 layers 3, 7, 11, ..."""

    first: int | None = Field(default=None, ge=1)
    """So many layers from the first on."""

    last: int | None = Field(default=None, ge=1)
    """So many layers up to the last."""

    mechanism: MechanismSettings

    @model_validator(mode="after")
    def _one_way(self) -> LayerRule:
        ways = [way for way in (self.layers, self.every, self.first, self.last) if way is not None]
        if len(ways) != 1:
            raise ValueError("exactly one of layers, every, first and last")
        return self

    def names(self, layer: int, layers: int) -> bool:
        """Whether the rule is about a layer.

        Args:
            layer: Counted from 0.
            layers: Of the whole model.
        """
        if self.layers is not None:
            return layer in self.layers
        if self.every is not None:
            return layer % self.every == self.every - 1
        if self.first is not None:
            return layer < self.first
        return self.last is not None and layer >= layers - self.last


class AttentionSettings(Settings):
    """The attention of a stage's layers."""

    mechanism: MechanismSettings = DenseSettings()
    """Of all layers that no rule below names."""

    layers: tuple[LayerRule, ...] = ()
    """Layers with another mechanism; of several rules for a layer the last one holds."""

    output_gate: Literal["none", "head", "channel"] = "none"
    """The output times sigmoid(W x), before its projection: one gate per head, or per channel
    (Qwen, arXiv 2505.06708)."""

    sinks: bool = False
    """A learned score per head with nothing behind it, so that a head may look at nothing."""

    scale: float | None = Field(default=None, gt=0)
    """Of the scores; left out: 1 / sqrt(head width)."""

    log_scale_from: Length | None = Field(default=None, ge=2)
    """Beyond this position queries grow with its logarithm, log(p) / log(this), so that attention
    stays as sharp over more tokens (Su 2021; SSMax, arXiv 2501.19399)."""

    def of_layer(self, layer: int, layers: int) -> MechanismSettings:
        """The mechanism of a layer, counted from 0 over the whole model's `layers`."""
        rules = [rule for rule in self.layers if rule.names(layer, layers)]
        return rules[-1].mechanism if rules else self.mechanism

    def mechanisms(self, layers: int) -> list[MechanismSettings]:
        """The mechanisms of all layers."""
        return [self.of_layer(layer, layers) for layer in range(layers)]


_LOSSES = {"ssa": "alignment", "seer": "gate_loss", "indexer": "index_loss"}


def auxiliary_losses(settings: AttentionSettings, layers: int) -> list[str]:
    """Names of the losses that mechanisms add to that of the model, sorted."""
    kinds = {mechanism.kind for mechanism in settings.mechanisms(layers)}
    return sorted(name for kind, name in _LOSSES.items() if kind in kinds)
