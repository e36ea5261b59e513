"""What becomes of a stage's attention in a Hugging Face checkpoint, which knows dense attention."""

from __future__ import annotations

from ...attention.catalogue import words
from ...attention.layer_settings import AttentionSettings
from ...attention.mechanism_settings import learns_by_itself
from ...errors import ConversionError


def exported_attention(attention: AttentionSettings, layers: int) -> str | None:
    """What to tell of attention that transformers computes densely; None where it is dense anyway.

    Args:
        attention: Of the stage that wrote the checkpoint.
        layers: Of the model.

    Raises:
        ConversionError: Dense attention with these weights is another model.
    """
    needed = []
    for kind in sorted({mechanism.kind for mechanism in attention.mechanisms(layers)}):
        if kind in ("nsa", "ssa"):
            needed.append(f"mechanism {kind}")
    if attention.output_gate != "none":
        needed.append(f"output_gate {attention.output_gate}")
    needed += [name for name in ("sinks",) if attention.sinks]
    needed += [name for name in ("scale", "log_scale_from") if getattr(attention, name) is not None]
    if needed:
        raise ConversionError(
            f"no supported Hugging Face family has this attention ({', '.join(needed)}), and "
            "without it the weights are of no use",
            "export a checkpoint of a stage without it",
        )
    mechanisms = attention.mechanisms(layers)
    if all(mechanism.kind == "dense" for mechanism in mechanisms):
        return None
    told = f"trained with {words(attention, layers)}; transformers attends densely"
    if any(map(learns_by_itself, mechanisms)):
        told += ", and what selects keys is not exported"
    return told
