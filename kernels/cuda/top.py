"""Top: launches top.cu.

Shapes: R rows, X candidates, N of them chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .program import Program

_SHAPES = (
    (1024, 1024, 8, 128),
    (4096, 4096, 8, 256),
    (65536, 4096, 11, 512),
    (2**31, 4096, 11, 1024),
)
"""Longest row, scores that fit in shared memory, bits of a digit, threads."""


def top_ids(scores_RX: Tensor, count: int) -> Tensor:
    """`kernels.top.top_ids` on a GPU.

    Needs no memory beside the result.

    Args:
        scores_RX: Scores in fp32; rows may be apart, and need not be aligned.
        count: How many to choose.
    """
    rows, candidates = scores_RX.shape
    chosen = torch.empty((rows, count), dtype=torch.int32, device=scores_RX.device)
    if count == 0:
        return chosen
    scores_RX = scores_RX.float()
    if scores_RX.stride(1) != 1:
        scores_RX = scores_RX.contiguous()
    stride = scores_RX.stride(0)
    _, fits, bits, threads = next(shape for shape in _SHAPES if candidates <= shape[0])
    program = Program("top.cu", (("LIST", fits), ("BITS", bits)))
    program.launch("top_ids", (rows,), threads, scores_RX, stride, candidates, count, chosen)
    return chosen
