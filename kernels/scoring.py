"""Scoring: how a query and a key become a softmax weight, and the gradients that come back.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """The score of query q and key k is cap(scale * q . k) + bias.

    cap(x) is softcap * tanh(x / softcap).

    Attributes:
        scale: Of the products.
        softcap: Bound of the scaled products; None for none.
        key_bias_SH: Added to every score of a key, per query head, after the cap; None for none.
    """

    scale: float
    softcap: float | None = None
    key_bias_SH: Tensor | None = None


class Gradients(NamedTuple):
    """What `attend_backward` returns; fp32, fp64 for fp64 inputs.

    Attributes:
        dq_THD: Of the queries.
        dk_SGD: Of the keys.
        dv_SGV: Of the values.
        dsink_H: Of the sinks, if there are any.
        dkey_bias_SH: Of the keys' biases, if there are any.
    """

    dq_THD: Tensor
    dk_SGD: Tensor
    dv_SGV: Tensor
    dsink_H: Tensor | None = None
    dkey_bias_SH: Tensor | None = None


def delta(dout_THV: Tensor, out_THV: Tensor, dlse_TH: Tensor | None) -> Tensor:
    """dout . out - dlse, which softmax gradients subtract from every score's: [T, H]."""
    delta_TH = (dout_THV * out_THV).sum(-1)
    return delta_TH if dlse_TH is None else delta_TH - dlse_TH
