"""Parameters: how many a mechanism and its options add to a layer, from settings alone. No torch.

Shapes: E hidden channels, H query heads, G key-value heads, D head dim, L tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layer_settings import AttentionSettings
from .mechanism_settings import (
    IndexerSettings,
    MechanismSettings,
    NsaSettings,
    SeerSettings,
    SsaSettings,
)


@dataclass(frozen=True)
class LayerShape:
    """The widths of a whole layer's attention.

    Attributes:
        hidden: Channels E of the layer's input.
        heads: Query heads H.
        groups: Key-value heads G.
        dim: Width D of a head.
    """

    hidden: int
    heads: int
    groups: int
    dim: int


def added_parameters(
    attention: AttentionSettings, mechanism: MechanismSettings, shape: LayerShape
) -> int:
    """Parameters that a layer has beside its projections.

    Args:
        attention: Of the stage; its output gate and sinks count.
        mechanism: Of the layer.
        shape: Of the layer.
    """
    added = linears(attention, mechanism, shape) + (shape.heads if attention.sinks else 0)
    match mechanism:
        case NsaSettings():
            places = {"none": 0, "keys": 1, "keys_and_values": 2}[mechanism.encode_position]
            places *= shape.groups * mechanism.compress_length * shape.dim
            return added + places + 2 * compression(mechanism, shape)
        case SeerSettings():
            return added + sum(gate_parameters(mechanism, shape))
        case IndexerSettings():
            # The index key has a norm with a bias.
            return added + index_parameters(mechanism, shape) + 2 * mechanism.dim
        case _:
            return added


def linears(attention: AttentionSettings, mechanism: MechanismSettings, shape: LayerShape) -> int:
    """Those that every token's layer input is multiplied with for the model's own output."""
    hidden, heads, groups, dim = shape.hidden, shape.heads, shape.groups, shape.dim
    gates = {"none": 0, "head": heads, "channel": heads * dim}
    added = gates[attention.output_gate] * hidden
    match mechanism:
        case NsaSettings(gate=gate, branch_kv=branch_kv):
            added += 3 * hidden * (heads if gate == "head" else 1)
            # Keys and values of two branches.
            return added + (4 * groups * dim * hidden if branch_kv == "independent" else 0)
        case SsaSettings():
            return added + heads * hidden
        case _:
            return added


def compression(mechanism: NsaSettings, shape: LayerShape) -> int:
    """Those that make one key (or value) of each window in NSA; places are not counted."""
    groups, dim, length = shape.groups, shape.dim, mechanism.compress_length
    each = {
        "mean": 0,
        "weighted": length,
        "linear": length * dim * dim,
        "mlp": length * dim * 2 * dim + 2 * dim * dim,
    }
    return groups * each[mechanism.compress]


def index_parameters(mechanism: IndexerSettings, shape: LayerShape) -> int:
    """Those of an indexer that every token's layer input is multiplied with."""
    choices = 1 if mechanism.share == "all_heads" else shape.groups
    queries = choices * mechanism.heads
    weights = queries if mechanism.heads > 1 else 0
    return shape.hidden * (queries * mechanism.dim + mechanism.dim + weights)


def gate_parameters(mechanism: SeerSettings, shape: LayerShape) -> tuple[int, int]:
    """Those of SeerAttention's gate for a query, and for the pooled keys of a block."""
    width = shape.dim * mechanism.dim
    # The mean, the largest and the smallest channels of a block's keys are joined.
    return shape.heads * width, 3 * shape.groups * width
