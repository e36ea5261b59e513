"""The rules of a stage's RoPE: it fits the heads and the layers, and every part has an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..attention.frequencies import attention_factor, frequencies, rotary_channels
from ..attention.settings import (
    DynamicScaling,
    LongRopeScaling,
    NtkScaling,
    RopeScaling,
    RopeSettings,
)
from ..errors import Problem
from ..trainer.settings import ModelSettings, StageSettings


def check_rope(model: ModelSettings, stage: StageSettings, at: str) -> Iterator[Problem]:
    """What is wrong with a stage's RoPE.

    Args:
        model: The model; an odd head width is its own problem and not told here.
        stage: The stage.
        at: Path of the RoPE, such as `stages.0.rope`.
    """
    rope = stage.rope
    beyond = [layer for layer in rope.nope_layers if layer >= model.layers]
    if beyond:
        expected = f"layers from 0 to {model.layers - 1} (model.layers is {model.layers})"
        yield Problem(f"{at}.nope_layers", ", ".join(map(str, beyond)), expected)
    if model.head_width % 2:
        return
    channels = rotary_channels(rope, model.head_width)
    if channels % 2 or not channels:
        # Rounded up, as the channels are rounded down.
        share = math.ceil(max(2, channels // 2 * 2) / model.head_width * 10_000) / 10_000
        expected = f"a share that makes an even number of {model.head_width} channels"
        got = f"{rope.rotary_share:g} ({channels} channels)"
        yield Problem(f"{at}.rotary_share", got, expected, f"rotary_share: {share:g}")
    elif rope.scaling is not None:
        yield from _check_scaling(rope, rope.scaling, model, stage.length, f"{at}.scaling")


def check_induction_rope(rope: RopeSettings, at: str) -> Iterator[Problem]:
    """The head of the first layer that finds the token before needs positions in all channels.

    Args:
        rope: Of the stage that the weights start in.
        at: Its path.
    """
    if 0 in rope.nope_layers:
        expected = "no layer 0, whose RoPE model.init induction needs"
        fix = "remove layer 0, or model.init: random"
        yield Problem(f"{at}.nope_layers", ", ".join(map(str, rope.nope_layers)), expected, fix)
    if rope.rotary_share < 1:
        expected = "1, which model.init induction needs"
        fix = "rotary_share: 1, or model.init: random"
        yield Problem(f"{at}.rotary_share", f"{rope.rotary_share:g}", expected, fix)


def _check_scaling(
    rope: RopeSettings, scaling: RopeScaling, model: ModelSettings, length: int, at: str
) -> Iterator[Problem]:
    channels = rotary_channels(rope, model.head_width)
    if isinstance(scaling, NtkScaling | DynamicScaling) and channels < 4:
        expected = f"another kind: it changes all pairs but the first, and {channels} channels turn"
        yield Problem(f"{at}.kind", scaling.kind, expected, "kind: linear")
        return
    if isinstance(scaling, LongRopeScaling):
        wrong = [
            Problem(f"{at}.{name}", f"{len(factors)} factors", f"{channels // 2}: one per pair")
            for name, factors in (
                ("short_factors", scaling.short_factors),
                ("long_factors", scaling.long_factors),
            )
            if len(factors) != channels // 2
        ]
        if wrong:
            yield from wrong
            return
    if isinstance(scaling, DynamicScaling) and length <= scaling.original_length:
        expected = f"less than the stage's length ({length}): up to there it has no effect"
        fix = "a smaller original_length, or no scaling in this stage"
        yield Problem(f"{at}.original_length", str(scaling.original_length), expected, fix)
    elif not _has_effect(rope, model, length):
        expected = "a scaling that changes a frequency or the attention factor"
        yield Problem(at, f"{scaling.kind}, which changes nothing", expected, "remove it")


def _has_effect(rope: RopeSettings, model: ModelSettings, length: int) -> bool:
    if len(rope.nope_layers) >= model.layers:
        return False
    width = model.head_width
    plain = frequencies(rope.model_copy(update={"scaling": None}), width, length)
    return attention_factor(rope, length) != 1 or frequencies(rope, width, length) != plain
