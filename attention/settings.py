"""How positions enter the scores. Importing this needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..settings import Length, Settings

Positive = Annotated[float, Field(gt=0)]


class LinearScaling(Settings):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every pair turns slower."""

    kind: Literal["linear"]
    factor: float = Field(ge=1)
    """Divides all frequencies."""


class NtkScaling(Settings):
    """NTK-aware (bloc97 2023): a base so large that the slowest pair turns `factor` times slower.

    Hugging Face has no such type; it is exported as that base.
    """

    kind: Literal["ntk"]
    factor: float = Field(ge=1)


class DynamicScaling(Settings):
    """NTK-aware, with a base that grows with the stage's length (emozilla 2023).

    transformers grows it with every sequence that is longer than the longest so far.
    """

    kind: Literal["dynamic"]
    factor: float = Field(ge=1)
    """How fast the base grows beyond the original length."""

    original_length: Length = Field(ge=2)
    """Up to this many tokens nothing changes; exported as `max_position_embeddings`."""


class YarnScaling(Settings):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): fast pairs stay, slow ones are interpolated.

    DeepSeek's own models scale the softmax by `mscale_all_dim`, too; that is not done here, nor
    by transformers' Llama and Qwen.
    """

    kind: Literal["yarn"]
    factor: float = Field(ge=1)
    """Divides the frequencies of slow pairs; the new length over the original one."""

    original_length: Length = Field(ge=2)
    """Tokens that the model was trained on before it was stretched."""

    beta_fast: float = Field(default=32.0, gt=0)
    """Pairs that turn more often than this within the original length keep their frequency."""

    beta_slow: float = Field(default=1.0, gt=0, validate_default=True)
    """Pairs that turn less often are interpolated in full; in between by a ramp."""

    attention_factor: float | None = Field(default=None, gt=0)
    """Multiplies queries and keys; left out: 0.1 ln(factor) + 1, or what the mscales give."""

    mscale: float | None = Field(default=None, gt=0)
    """DeepSeek's form: (0.1 mscale ln(factor) + 1) / (the same with mscale_all_dim)."""

    mscale_all_dim: float | None = Field(default=None, gt=0, validate_default=True)
    truncate: bool = True
    """Round the ends of the ramp to whole pairs, outwards."""

    @field_validator("beta_slow")
    @classmethod
    def _slower(cls, value: float, info: ValidationInfo) -> float:
        fast = info.data.get("beta_fast")
        if fast is not None and value >= fast:
            raise ValueError(f"less than beta_fast ({fast:g})")
        return value

    @field_validator("mscale")
    @classmethod
    def _decides(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("attention_factor") is not None:
            raise ValueError("no such setting: attention_factor decides")
        return value

    @field_validator("mscale_all_dim")
    @classmethod
    def _both(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "mscale" in info.data and (value is None) != (info.data["mscale"] is None):
            raise ValueError("both of mscale and mscale_all_dim, or neither")
        return value


class Llama3Scaling(Settings):
    """As Llama 3.1 was stretched: like YaRN, with a ramp over turns and no attention factor."""

    kind: Literal["llama3"]
    factor: float = Field(ge=1)
    """Divides the frequencies of slow pairs."""

    low_freq_factor: float = Field(gt=0)
    """Pairs that turn less often within the original length are slowed down in full."""

    high_freq_factor: float = Field(gt=0)
    """Pairs that turn more often keep their frequency."""

    original_length: Length = Field(ge=2)
    """Tokens that the model was trained on before it was stretched."""

    @field_validator("high_freq_factor")
    @classmethod
    def _higher(cls, value: float, info: ValidationInfo) -> float:
        low = info.data.get("low_freq_factor")
        if low is not None and value <= low:
            raise ValueError(f"more than low_freq_factor ({low:g})")
        return value


class LongRopeScaling(Settings):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a searched factor for each pair."""

    kind: Literal["longrope"]
    short_factors: tuple[Positive, ...] = Field(min_length=1)
    """Divide the frequencies, one per pair, where a stage is at most the original length."""

    long_factors: tuple[Positive, ...] = Field(min_length=1)
    """The same for longer stages."""

    original_length: Length = Field(ge=2)
    """Tokens that the model was trained on before it was stretched."""

    factor: float | None = Field(default=None, ge=1)
    """Gives the attention factor; left out: the stage's length over the original one."""

    attention_factor: float | None = Field(default=None, gt=0)
    """Multiplies queries and keys; left out: sqrt(1 + ln(factor) / ln(original_length))."""


RopeScaling = Annotated[
    LinearScaling | NtkScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling,
    Field(discriminator="kind"),
]


class RopeSettings(Settings):
    """Rotary position embedding; positions count from the start of each document."""

    base: float = Field(default=10_000.0, gt=1)
    """Theta: the wavelength base. A larger base stretches a model to a longer context."""

    scaling: RopeScaling | None = None
    """How the frequencies are changed beyond their base; null: not at all."""

    rotary_share: float = Field(default=1.0, gt=0, le=1)
    """The first share of each head's channels turns, the others know no position."""

    nope_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers, counted from 0, in which nothing turns (NoPE)."""

    @field_validator("nope_layers")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({layer for layer in value if value.count(layer) > 1})
        if twice:
            raise ValueError(f"each layer once, but {', '.join(map(str, twice))} is repeated")
        return tuple(sorted(value))

    @property
    def words(self) -> str:
        """For people, on one line: `base 500,000, llama3 x8 from 8,192 tokens`."""
        parts, scaling = [f"base {self.base:,.15g}"], self.scaling
        if scaling is not None:
            factor = getattr(scaling, "factor", None)
            original = getattr(scaling, "original_length", None)
            times = f" x{factor:g}" if factor else ""
            parts.append(scaling.kind + times + (f" from {original:,} tokens" if original else ""))
        if self.rotary_share < 1:
            parts.append(f"{self.rotary_share:.0%} of channels")
        if self.nope_layers:
            parts.append(f"none in layers {', '.join(map(str, self.nope_layers))}")
        return ", ".join(parts)
