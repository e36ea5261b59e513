"""Gate: learned queries and block keys whose products choose blocks, and how they are trained.

Shapes: T query rows, B blocks of the grid, C gate heads, E key heads (1 or C), D gate dim; M rows
of a chunk, U blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import wide, wide_zeros
from .slots import Slots


@dataclass(frozen=True, eq=False)
class Gate:
    """The logit of query t and block b is scale * q[t] . k[b] (SeerAttention, arXiv 2410.13276).

    Attributes:
        q_TCD: Gate queries.
        k_BED: Gate keys, one per block of the grid; gate head c reads key head c, or the only one.
        scale: Of the products.
    """

    q_TCD: Tensor
    k_BED: Tensor
    scale: float

    def __post_init__(self) -> None:
        q, k = self.q_TCD, self.k_BED
        shapes = f"q {list(q.shape)}, k {list(k.shape)}"
        if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2]:
            raise ValueError(f"a gate wants q [T, C, D] and k [B, E, D], not {shapes}")
        if not q.shape[1] or k.shape[1] not in (1, q.shape[1]):
            raise ValueError(f"a gate wants one key head, or one per gate head: {shapes}")


class GateGradients(NamedTuple):
    """Gradients of a gate; fp32, fp64 for fp64 inputs.

    Attributes:
        dq_TCD: Of the queries.
        dk_BED: Of the keys.
    """

    dq_TCD: Tensor
    dk_BED: Tensor

    @classmethod
    def zeros(cls, gate: Gate) -> GateGradients:
        """Gradients of nothing yet."""
        return cls(wide_zeros(gate.q_TCD), wide_zeros(gate.k_BED))


def gate_logits(gate: Gate, slots: Slots) -> Tensor:
    """Logits of the rows and blocks of `slots`, [C, M, U]; those not seen have one too."""
    q_CMD, parts = wide(gate.q_TCD[slots.rows]).transpose(0, 1), []
    for c, q_MD in enumerate(q_CMD):
        k_UD = wide(slots.of_units(_key_head(gate.k_BED, c), c))
        parts.append(torch.matmul(q_MD.unsqueeze(1), k_UD.mT).squeeze(1))
    return torch.stack(parts).mul_(gate.scale)


def add_gate_gradients(total: GateGradients, gate: Gate, slots: Slots, dlogits_CMU: Tensor) -> None:
    """Adds the gradients that those of the logits bring.

    Args:
        total: Added to. A row must come only once.
        gate: The gate.
        slots: As for the logits.
        dlogits_CMU: Gradient of the logits; 0 where a row does not see the block.
    """
    for c, dlogits_MU in enumerate(dlogits_CMU.mul_(gate.scale)):
        q_MD = wide(gate.q_TCD[slots.rows, c])
        k_UD = wide(slots.of_units(_key_head(gate.k_BED, c), c))
        dq_M1D = torch.matmul(dlogits_MU.unsqueeze(1), k_UD)
        total.dq_TCD[slots.rows, c] = dq_M1D.squeeze(1)
        if k_UD.ndim == 2:
            part = dlogits_MU.T @ q_MD
        else:
            part = dlogits_MU.unsqueeze(2) * q_MD.unsqueeze(1)
        slots.add_to_units(_key_head(total.dk_BED, c), part, c)


def _key_head(k_BED: Tensor, head: int) -> Tensor:
    return k_BED[:, head if k_BED.shape[1] > 1 else 0]
