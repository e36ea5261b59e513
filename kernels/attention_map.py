"""Attention map: how much the queries of a chunk look at each key or block, as a target to learn.

Shapes: T query rows, S keys, H query heads, K key-value heads, D key dim, C maps (of H / C query
heads each); M rows of a chunk, U blocks, Z places for the keys of a block, L = U * Z, r some query
heads of one key-value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .precision import wide, wide_dtype
from .scoring import Scoring
from .slots import Slots

Fold = Literal["sum", "max"]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The weights exp(score - lse) of an attention, summed over heads and pooled over keys.

    No map of the sequence exists: `chunk` computes it for some rows.

    Attributes:
        q_THD: The attention's queries, after RoPE.
        k_SKD: Its keys.
        lse_TH: Its lse, over whatever it saw (sinks included).
        scoring: How its products become scores.
        maps: C. 1 for one map of all heads (DSA), K for one per key-value head (MSA, Seer).
        over_heads: How the heads of a map become one: DSA and MSA sum, SeerAttention-R takes the
            largest.
        over_keys: How the keys of a block become one, after the heads.
        reduce: Folds a tensor over the tensor ranks that hold the other heads of the same maps,
            and returns it: an all-reduce with the operator of `over_heads`. Every such rank calls
            it equally often with equal shapes, in the same order, for equal reach, choices and
            options. With it, every rank computes the same loss and gradients. None if the heads
            are all here.
    """

    q_THD: Tensor
    k_SKD: Tensor
    lse_TH: Tensor
    scoring: Scoring
    maps: int = 1
    over_heads: Fold = "sum"
    over_keys: Fold = "sum"
    reduce: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        q, k = self.q_THD, self.k_SKD
        shapes = f"q {list(q.shape)}, k {list(k.shape)}"
        if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2]:
            raise ValueError(f"an attention map wants q [T, H, D] and k [S, K, D], not {shapes}")
        heads, groups, maps = q.shape[1], k.shape[1], self.maps
        if not groups or heads % groups or maps < 1 or heads % maps:
            raise ValueError(f"{maps} maps cannot be made of the heads of {shapes}")
        if groups % maps and maps % groups:
            raise ValueError(f"{maps} maps and the key-value heads of {shapes}: one must divide "
                             "the other")  # fmt: skip
        for name in ("over_heads", "over_keys"):
            if getattr(self, name) not in ("sum", "max"):
                raise ValueError(f"{name} is sum or max, not {getattr(self, name)!r}")
        bias_SH = self.scoring.key_bias_SH
        if bias_SH is not None and bias_SH.shape != (len(k), heads):
            raise ValueError(f"biases must be [S, H] = {[len(k), heads]}, not "
                             f"{list(bias_SH.shape)}")  # fmt: skip
        if self.lse_TH.shape != q.shape[:2]:
            raise ValueError(f"the lse must be [T, H] like {shapes}, not "
                             f"{list(self.lse_TH.shape)}")  # fmt: skip

    def chunk(self, slots: Slots, elements: int) -> Tensor:
        """The maps over the blocks of `slots`, [C, M, U], not normalised; 0 where unseen.

        Args:
            slots: Rows and blocks.
            elements: Of a temporary.
        """
        rows, blocks, size = slots.shape
        shape, dtype = (self.maps, rows, blocks * size), wide_dtype(self.q_THD)
        mass_CML = self.q_THD.new_zeros(shape, dtype=dtype)
        for c, group, heads in self._parts(max(1, elements // max(1, rows * blocks * size))):
            weights_MrL = self._weights(slots, c, group, heads)
            if self.over_heads == "sum":
                mass_CML[c] += weights_MrL.sum(1)
            else:
                torch.maximum(mass_CML[c], weights_MrL.amax(1), out=mass_CML[c])
        # Hidden keys may have any weight, even an infinite one.
        mass_CML.masked_fill_(~slots.seen_CMUZ.flatten(2), 0.0)
        # Equal folds commute, and blocks are fewer than keys.
        early = size > 1 and self.over_heads != self.over_keys
        if self.reduce is not None and early:
            mass_CML = self.reduce(mass_CML)
        mass_CMU = mass_CML
        if size > 1:
            mass_CMUZ = mass_CML.unflatten(2, (blocks, size))
            mass_CMU = mass_CMUZ.sum(-1) if self.over_keys == "sum" else mass_CMUZ.amax(-1)
        if self.reduce is not None and not early:
            mass_CMU = self.reduce(mass_CMU)
        return mass_CMU

    def _parts(self, most: int) -> Iterator[tuple[int, int, slice]]:
        """Map, key-value head and at most so many query heads that they share."""
        heads, groups = self.q_THD.shape[1], self.k_SKD.shape[1]
        parts = max(self.maps, groups)
        width = heads // parts
        for part in range(parts):
            for start in range(part * width, (part + 1) * width, most):
                some = slice(start, min(start + most, (part + 1) * width))
                yield part * self.maps // parts, part * groups // parts, some

    def _weights(self, slots: Slots, c: int, group: int, heads: slice) -> Tensor:
        """exp(score - lse), [M, r, L]."""
        scoring = self.scoring
        q_MrD = wide(self.q_THD[slots.rows, heads])
        k_LD = wide(slots.of_keys(self.k_SKD[:, group], c))
        scores_MrL = torch.matmul(q_MrD, k_LD.mT).mul_(scoring.scale)
        if scoring.softcap is not None:
            scores_MrL.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        if scoring.key_bias_SH is not None:
            scores_MrL += wide(slots.of_keys(scoring.key_bias_SH[:, heads], c)).mT
        lse_Mr1 = self.lse_TH[slots.rows, heads, None].to(scores_MrL.dtype)
        # A row whose attention saw nothing has lse -inf, and no weights.
        return scores_MrL.sub_(lse_Mr1.masked_fill(lse_Mr1 == float("-inf"), float("inf"))).exp_()
