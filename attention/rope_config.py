"""RoPE as Hugging Face configurations write it, both spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LongspanError
from .settings import RopeSettings


def read_rope(config: Mapping[str, Any]) -> RopeSettings:
    """The RoPE of a model's configuration.

    Args:
        config: With `rope_theta` at the top (transformers 4) or in `rope_parameters` (5).

    Raises:
        LongspanError: It has layers without RoPE, or a scaling.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise LongspanError(f"RoPE of type {kind!r} is not supported", "use an unscaled model")
    if not all(config.get("no_rope_layers") or ()):
        raise LongspanError("layers without RoPE are not supported", "use another model")
    return RopeSettings(base=float(parameters.get("rope_theta") or config["rope_theta"]))


def write_rope(rope: RopeSettings, *, max_length: int, layers: int) -> dict[str, Any]:
    """The configuration's fields that say the same, in the spelling of transformers 5."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": rope.base}}
