"""Launch: what every attention kernel is told about its inputs.

Shapes: T rows or keys, H heads, D dim; S keys, G key-value heads, V value dim.
"""

from __future__ import annotations

from torch import Tensor
from triton import next_power_of_2

from ..scoring import Scoring

SMALLEST_DIM = 16
"""Of an operand of `tl.dot`."""


def dense_rows(x_THD: Tensor) -> Tensor:
    """`x`, copied only if the elements of a row do not lie next to each other."""
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def scalars(scoring: Scoring) -> tuple[float, float]:
    """The kernels' `scale` and `softcap`."""
    return float(scoring.scale), float(scoring.softcap or 0.0)


def constants(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, scoring: Scoring
) -> dict[str, int | bool]:
    """The kernels' constants.

    GROUP is the number of query heads per key-value head. DIM and VALUE_DIM are dims, BLOCK_D and
    BLOCK_V the same up to powers of two. BYTES is the size of an element, for which the launch
    options differ. CAP and BIAS say what a score has. PLAIN is a score that is the product times a
    positive number, which kernels multiply by late.
    """
    cap, bias = scoring.softcap is not None, scoring.key_bias_SH is not None
    return {
        "GROUP": q_THD.shape[1] // k_SGD.shape[1],
        "DIM": q_THD.shape[2],
        "BLOCK_D": max(SMALLEST_DIM, next_power_of_2(q_THD.shape[2])),
        "VALUE_DIM": v_SGV.shape[2],
        "BLOCK_V": max(SMALLEST_DIM, next_power_of_2(v_SGV.shape[2])),
        "BYTES": q_THD.element_size(),
        "CAP": cap,
        "BIAS": bias,
        "PLAIN": scoring.scale > 0 and not cap and not bias,
    }
