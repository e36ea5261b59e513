"""RMSNorm that megatron's sequence parallelism can use."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), weight only.

    Under sequence parallelism each tensor rank sees part of the tokens; the mark on the weight
    tells megatron to sum its gradient over the tensor ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` of shape [..., hidden_size]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
