"""How fast each channel pair turns, for every kind of RoPE; plain numbers, no torch.

The formulas are the papers', in the variants that transformers computes with, so that a model
means the same there. A pair is counted from the fastest one.
"""

from __future__ import annotations

import math

from ..errors import LongspanError
from .settings import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    RopeSettings,
    YarnScaling,
)


def rotary_channels(rope: RopeSettings, head_dim: int) -> int:
    """Channels of a head that turn; a fraction is cut off, as transformers does."""
    return int(head_dim * rope.rotary_share)


def frequencies(rope: RopeSettings, head_dim: int, length: int) -> list[float]:
    """Radians per token of each pair.

    Args:
        rope: The kind of RoPE.
        head_dim: Channels of one head.
        length: Tokens in a sequence of the stage; dynamic NTK and LongRoPE choose by it.

    Raises:
        LongspanError: The channels do not fit the kind.
    """
    channels, scaling = rotary_channels(rope, head_dim), rope.scaling
    if channels % 2 or not channels:
        raise LongspanError(
            "rotary position embedding turns pairs of channels, but the head dim is "
            f"{head_dim}, of which rotary_share {rope.rotary_share:g} makes {channels}",
            fix="use an even model.head_dim and a rotary_share that takes an even part of it",
        )
    base = scaled_base(rope, head_dim, length)
    plain = [base ** (-2 * pair / channels) for pair in range(channels // 2)]
    match scaling:
        case LinearScaling():
            return [turn / scaling.factor for turn in plain]
        case YarnScaling():
            return _yarn(scaling, base, plain)
        case Llama3Scaling():
            return [_llama3(scaling, turn) for turn in plain]
        case LongRopeScaling():
            return _longrope(scaling, plain, length)
        case _:
            return plain


def scaled_base(rope: RopeSettings, head_dim: int, length: int) -> float:
    """The base that the frequencies are computed with: NTK-aware kinds change it.

    Raises:
        LongspanError: An NTK-aware kind has a single pair, which no base slows down.
    """
    scaling = rope.scaling
    if not isinstance(scaling, NtkScaling | DynamicScaling):
        return rope.base
    channels = rotary_channels(rope, head_dim)
    if channels < 4:
        raise LongspanError(
            f"rope.scaling {scaling.kind} changes all pairs of channels but the first, and "
            f"{channels} of {head_dim} channels turn",
            fix="use at least 4 turning channels, or another kind of scaling",
        )
    factor = scaling.factor
    if isinstance(scaling, DynamicScaling):
        original = scaling.original_length
        factor = factor * max(length, original) / original - (factor - 1)
    return rope.base * factor ** (channels / (channels - 2))


def attention_factor(rope: RopeSettings, length: int) -> float:
    """What cosines and sines are multiplied by: scores grow by its square.

    Args:
        rope: The kind of RoPE.
        length: Tokens in a sequence of the stage; LongRoPE without a factor takes it from there.
    """
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, LongRopeScaling):
        factor = scaling.factor or max(1.0, length / scaling.original_length)
        return math.sqrt(1 + math.log(factor) / math.log(scaling.original_length))
    growth = 0.1 * math.log(scaling.factor)
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return growth + 1
    return (growth * scaling.mscale + 1) / (growth * scaling.mscale_all_dim + 1)


def _yarn(scaling: YarnScaling, base: float, plain: list[float]) -> list[float]:
    """A ramp over pairs, from what turns beta_fast times to what turns beta_slow times."""
    channels = 2 * len(plain)

    def pair(turns: float) -> float:
        per_turn = math.log(scaling.original_length / (turns * 2 * math.pi))
        return channels * per_turn / (2 * math.log(base))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The reference clamps to the channels, not to the pairs; a ramp of no width is a step.
    first, last = max(first, 0), min(last, channels - 1)
    width = last - first or 0.001
    return [
        _slowed(turn, _unit((at - first) / width), scaling.factor) for at, turn in enumerate(plain)
    ]


def _llama3(scaling: Llama3Scaling, turn: float) -> float:
    """A ramp over how often a pair turns within the original length."""
    turns = scaling.original_length * turn / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return _slowed(turn, 1 - _unit((turns - low) / (high - low)), scaling.factor)


def _longrope(scaling: LongRopeScaling, plain: list[float], length: int) -> list[float]:
    long = length > scaling.original_length
    name, factors = ("long" if long else "short"), scaling.short_factors
    if long:
        factors = scaling.long_factors
    if len(factors) != len(plain):
        raise LongspanError(
            f"rope.scaling.{name}_factors has {len(factors)} entries for {len(plain)} pairs of "
            "turning channels",
            fix="give one factor per pair",
        )
    return [turn / factor for turn, factor in zip(plain, factors, strict=True)]


def _slowed(turn: float, share: float, factor: float) -> float:
    """A mix of a frequency and, with weight `share`, the same divided by `factor`."""
    return turn * (1 - share + share / factor)


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)
