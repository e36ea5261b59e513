"""Request: what a call of `attend` asks of a backend.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .reach import Reach
from .scoring import Scoring

DEBUG = "LONGSPAN_DEBUG"
"""Environment variable that has every call look at its numbers, which waits for the device."""


@dataclass(frozen=True)
class Request:
    """Everything that decides which backend serves a call; no data.

    Attributes:
        device: Where the tensors are.
        dtype: Of queries, keys and values.
        heads: Query heads.
        groups: Key-value heads.
        dim: Of queries and keys.
        value_dim: Of values.
        reach: The keys that each query sees.
        blocks: The blocks that each query chose, if the call has any.
        scoring: How products become scores.
        dlse: Whether a backward is asked for with a gradient of the lse.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    dim: int
    value_dim: int
    reach: Reach
    blocks: Blocks | None
    scoring: Scoring
    dlse: bool = False

    @classmethod
    def of(
        cls,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        reach: Reach,
        blocks: Blocks | None,
        scoring: Scoring,
        dlse: bool = False,
    ) -> Request:
        """The request of a call, checked.

        Raises:
            ValueError: Shapes, dtypes, devices or counts that contradict each other; with
                LONGSPAN_DEBUG set also NaN inputs and blocks that are not in the grid.
        """
        _check_tensors(q_THD, k_SGD, v_SGV)
        _check_choices(q_THD, k_SGD, reach, blocks, scoring)
        if os.environ.get(DEBUG):
            _check_numbers({"q": q_THD, "k": k_SGD, "v": v_SGV}, blocks)
        heads, groups, dims = q_THD.shape[1], k_SGD.shape[1], (q_THD.shape[2], v_SGV.shape[2])
        kind = q_THD.device, q_THD.dtype, heads, groups, *dims
        return cls(*kind, reach, blocks, scoring, dlse)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if {q.ndim, k.ndim, v.ndim} != {3}:
        raise ValueError(f"attend wants q [T, H, D], k [S, G, D] and v [S, G, V], not {shapes}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"queries and keys must have the same head dim: {shapes}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"keys and values must agree in tokens and heads: {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key-value heads: {shapes}")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating-point dtype, not {q.dtype}, "
                         f"{k.dtype}, {v.dtype}")  # fmt: skip
    if len({q.device, k.device, v.device}) > 1:
        raise ValueError(
            f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}"
        )


def _check_choices(
    q: Tensor, k: Tensor, reach: Reach, blocks: Blocks | None, scoring: Scoring
) -> None:
    if len(q) != len(reach):
        raise ValueError(f"{len(q)} query rows, but a reach of {len(reach)}")
    if reach.stop > len(k):
        raise ValueError(f"{len(k)} keys, but a reach up to key {reach.stop}")
    if scoring.softcap is not None and not scoring.softcap > 0:
        raise ValueError(f"the soft cap must be above 0, not {scoring.softcap}")
    bias = scoring.key_bias_SH
    if bias is not None and bias.shape != (len(k), q.shape[1]):
        raise ValueError(f"the keys' biases must be [S, H] = [{len(k)}, {q.shape[1]}], "
                         f"not {list(bias.shape)}")  # fmt: skip
    if blocks is None:
        return
    heads, groups, count = q.shape[1], k.shape[1], blocks.ids_QCN.shape[1]
    if not count or heads % count or (groups % count and count % groups):
        raise ValueError(f"{count} block heads cannot serve {heads} query heads and {groups} "
                         "key-value heads: one must divide the other")  # fmt: skip
    if blocks.rows != len(q):
        raise ValueError(f"{len(q)} query rows, but blocks for {blocks.rows}")
    if blocks.ids_QCN.device != q.device:
        raise ValueError(f"queries are on {q.device}, their blocks on {blocks.ids_QCN.device}")
    if int(blocks.grid.starts_B1[-1]) > len(k):
        raise ValueError(f"{len(k)} keys, but a grid of {int(blocks.grid.starts_B1[-1])}")


def _check_numbers(tensors: dict[str, Tensor], blocks: Blocks | None) -> None:
    for name, x in tensors.items():
        bad = x.isnan().nonzero()
        if len(bad):
            raise ValueError(f"{name} {list(x.shape)} has {len(bad)} NaN, the first at "
                             f"{bad[0].tolist()}")  # fmt: skip
    if blocks is not None and blocks.ids_QCN.numel():
        highest = int(blocks.ids_QCN.max())
        if highest >= len(blocks.grid):
            raise ValueError(f"block {highest} is not in a grid of {len(blocks.grid)} blocks")
