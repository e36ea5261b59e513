"""Indexer: small heads that score keys for a selection, and how their scores are trained.

Shapes: T query rows, S keys, C block heads (heads that choose separately), J index heads of a
block head, E key heads (1 or C), D index dim; M rows of a chunk, L keys; B batches of N rows that
look at the same L keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import wide, wide_zeros
from .slots import Slots

MAX_ELEMENTS = 2**22
"""Elements of one temporary; about eight of them exist at once."""


@dataclass(frozen=True, eq=False)
class Index:
    """The score of query t and key s is scale * sum_j weight[t, j] * relu(q[t, j] . k[s]).

    DeepSeek-V3.2's lightning indexer has one block head for all heads of the attention (C = 1) of
    64 index heads; MiniMax-M3's has one block head per key-value head, of one index head each, and
    one key head (E = 1).

    Attributes:
        q_TCJD: Index queries.
        k_SED: Index keys; block head c reads key head c, or the only one.
        weight_TCJ: Of the index heads; None for 1.
        scale: Of the scores.
        relu: False for a sum of plain products.
    """

    q_TCJD: Tensor
    k_SED: Tensor
    weight_TCJ: Tensor | None = None
    scale: float = 1.0
    relu: bool = True

    def __post_init__(self) -> None:
        q, k, weight = self.q_TCJD, self.k_SED, self.weight_TCJ
        shapes = f"q {list(q.shape)}, k {list(k.shape)}"
        if q.ndim != 4 or k.ndim != 3 or q.shape[3] != k.shape[2]:
            raise ValueError(f"an index wants q [T, C, J, D] and k [S, E, D], not {shapes}")
        if not q.shape[1] or k.shape[1] not in (1, q.shape[1]):
            raise ValueError(f"an index wants one key head, or one per block head: {shapes}")
        if weight is not None and weight.shape != q.shape[:3]:
            raise ValueError(f"an index wants weights [T, C, J] like {shapes}, "
                             f"not {list(weight.shape)}")  # fmt: skip
        devices = {x.device for x in (q, k, weight) if x is not None}
        if len(devices) > 1:
            raise ValueError(f"an index must be on one device, not {sorted(map(str, devices))}")

    @property
    def heads(self) -> int:
        """Block heads."""
        return self.q_TCJD.shape[1]


class IndexGradients(NamedTuple):
    """Gradients of an index; fp32, fp64 for fp64 inputs.

    Attributes:
        dq_TCJD: Of the queries.
        dk_SED: Of the keys.
        dweight_TCJ: Of the weights, if there are any.
    """

    dq_TCJD: Tensor
    dk_SED: Tensor
    dweight_TCJ: Tensor | None

    @classmethod
    def zeros(cls, index: Index) -> IndexGradients:
        """Gradients of nothing yet."""
        weight = index.weight_TCJ
        dweight = None if weight is None else wide_zeros(weight)
        return cls(wide_zeros(index.q_TCJD), wide_zeros(index.k_SED), dweight)


def index_scores(index: Index, slots: Slots, elements: int = MAX_ELEMENTS) -> Tensor:
    """Scores of the rows and keys of `slots`, [C, M, L]; those not seen are scored too.

    Args:
        index: The index.
        slots: Rows and keys. All index heads of a pair are never in memory at once, unless the
            keys are few.
        elements: Of a temporary.
    """
    q_BJND, k_BLD, weight_BJN = _operands(index, slots)
    scores_BNL = q_BJND.new_zeros(len(q_BJND), q_BJND.shape[2], k_BLD.shape[1])
    for some in _slabs(q_BJND, k_BLD, elements):
        products_BjNL = _products(q_BJND[:, some], k_BLD)
        if index.relu:
            products_BjNL.relu_()
        weight_BjN1 = weight_BJN[:, some, :, None]
        if products_BjNL.shape[1] == 1:
            scores_BNL.addcmul_(products_BjNL[:, 0], weight_BjN1[:, 0])
        else:
            scores_BNL += products_BjNL.mul_(weight_BjN1).sum(1)
    return scores_BNL.view(index.heads, -1, k_BLD.shape[1])


def add_index_gradients(
    total: IndexGradients,
    index: Index,
    slots: Slots,
    dscores_CML: Tensor,
    elements: int = MAX_ELEMENTS,
) -> None:
    """Adds the gradients that those of the scores bring.

    Args:
        total: Added to. A row must come only once.
        index: The index.
        slots: As for the scores.
        dscores_CML: Gradient of the scores; 0 where a row does not see the key.
        elements: Of a temporary.
    """
    q_BJND, k_BLD, weight_BJN = _operands(index, slots)
    dscores_B1NL = dscores_CML.reshape(len(q_BJND), 1, -1, k_BLD.shape[1])
    dq_BJND, dk_BLD = torch.empty_like(q_BJND), torch.zeros_like(k_BLD)
    dweight_BJN = torch.empty_like(weight_BJN)
    for some in _slabs(q_BJND, k_BLD, elements):
        products_BjNL = _products(q_BJND[:, some], k_BLD)
        if index.relu:
            products_BjNL.relu_()
        dweight_BJN[:, some] = (products_BjNL * dscores_B1NL).sum(-1)
        dproducts_BjNL = dscores_B1NL * weight_BJN[:, some, :, None]
        if index.relu:
            # The slope of relu is 1 where its value is positive, and 0 at 0.
            dproducts_BjNL.mul_(products_BjNL.sign_())
        dproducts_BNL = dproducts_BjNL.flatten(1, 2)
        dq_BJND[:, some] = (dproducts_BNL @ k_BLD).view_as(dq_BJND[:, some])
        dk_BLD.baddbmm_(dproducts_BNL.mT, q_BJND[:, some].flatten(1, 2))
    _add_keys(total.dk_SED, index, slots, dk_BLD)
    total.dq_TCJD[slots.rows] = _rows_back(dq_BJND, index, slots)
    if total.dweight_TCJ is not None:
        dweight_BJN1 = dweight_BJN.mul_(index.scale).unsqueeze(-1)
        total.dweight_TCJ[slots.rows] = _rows_back(dweight_BJN1, index, slots).squeeze(-1)


def _operands(index: Index, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, J, N, D], keys [B, L, D] and weights [B, J, N] (times the scale).

    A batch is a key head if the rows share their keys, otherwise a row of a block head.
    """
    q_MCJD = wide(index.q_TCJD[slots.rows])
    if index.weight_TCJ is None:
        weight_MCJ1 = q_MCJD.new_ones(*q_MCJD.shape[:3], 1)
    else:
        weight_MCJ1 = wide(index.weight_TCJ[slots.rows]).unsqueeze(-1)
    q_BJND, weight_BJN1 = (_rows_in(x, index, slots) for x in (q_MCJD, weight_MCJ1))
    if not isinstance(slots.units, Tensor):
        k_BLD = wide(slots.of_keys(index.k_SED, 0)).transpose(0, 1)
    else:
        last = index.k_SED.shape[1] - 1
        k_CMLD = [slots.of_keys(index.k_SED[:, min(c, last)], c) for c in range(index.heads)]
        k_BLD = wide(torch.cat(k_CMLD))
    return q_BJND, k_BLD, weight_BJN1.squeeze(-1) * index.scale


def _rows_in(x_MCJD: Tensor, index: Index, slots: Slots) -> Tensor:
    """[M, C, J, D] as [B, J, N, D]."""
    if isinstance(slots.units, Tensor):
        return x_MCJD.transpose(0, 1).flatten(0, 1).unsqueeze(2)
    x_MEFJD = x_MCJD.unflatten(1, (index.k_SED.shape[1], -1))
    return x_MEFJD.permute(1, 3, 2, 0, 4).flatten(2, 3)


def _rows_back(x_BJND: Tensor, index: Index, slots: Slots) -> Tensor:
    """The inverse of `_rows_in`."""
    rows = slots.shape[0]
    if isinstance(slots.units, Tensor):
        return x_BJND.squeeze(2).unflatten(0, (index.heads, rows)).transpose(0, 1)
    return x_BJND.unflatten(2, (-1, rows)).permute(3, 0, 2, 1, 4).flatten(1, 2)


def _add_keys(total_SED: Tensor, index: Index, slots: Slots, dk_BLD: Tensor) -> None:
    if not isinstance(slots.units, Tensor):
        slots.add_to_keys(total_SED, dk_BLD.transpose(0, 1), 0)
        return
    for c, dk_MLD in enumerate(dk_BLD.unflatten(0, (index.heads, -1))):
        slots.add_to_keys(total_SED[:, min(c, total_SED.shape[1] - 1)], dk_MLD, c)


def _slabs(q_BJND: Tensor, k_BLD: Tensor, elements: int) -> Iterator[slice]:
    """Ranges of index heads whose products fit."""
    batches, heads, rows, _ = q_BJND.shape
    step = max(1, elements // max(1, batches * rows * k_BLD.shape[1]))
    for start in range(0, heads, step):
        yield slice(start, start + step)


def _products(q_BjND: Tensor, k_BLD: Tensor) -> Tensor:
    """q . k, [B, j, N, L]."""
    return (q_BjND.flatten(1, 2) @ k_BLD.mT).view(*q_BjND.shape[:3], -1)
