"""Rotary position embedding in the rotate-half convention (GPT-NeoX; Hugging Face Llama).

RoFormer (Su et al. 2021, arXiv 2104.09864). Channel i of the first half of a head turns with
channel i of the second half. Shapes: T tokens, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LongspanError
from .settings import RopeSettings


def inverse_frequencies(settings: RopeSettings, head_dim: int) -> Tensor:
    """Radians per token of each channel pair, fp32 [D / 2], computed in fp64.

    Raises:
        LongspanError: The head dim is odd.
    """
    if head_dim % 2:
        raise LongspanError(
            f"rotary position embedding turns pairs of channels, but the head dim is {head_dim}",
            fix="use an even model.head_dim",
        )
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (settings.base**-exponent).float()


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of the tokens of one micro-batch, both halves of D alike.

    Attributes:
        cos_TD: fp32.
        sin_TD: fp32.
    """

    cos_TD: Tensor
    sin_TD: Tensor

    @classmethod
    def build(cls, positions_T: Tensor, settings: RopeSettings, head_dim: int) -> RotaryTable:
        """The table for `positions_T`, on their device.

        Args:
            positions_T: Positions within the document, int64.
            settings: Base of the frequencies.
            head_dim: Channels of one head.
        """
        turns = inverse_frequencies(settings, head_dim).to(positions_T.device)
        # fp32 angles are off by up to 0.03 radians at a million tokens.
        angle_TD = torch.outer(positions_T.double(), turns.double()).repeat(1, 2)
        return cls(angle_TD.cos().float(), angle_TD.sin().float())

    def apply(self, x_THD: Tensor) -> Tensor:
        """`x_THD` turned by each token's position; computed in fp32, returned in its dtype."""
        return _Rotate.apply(x_THD, self.cos_TD, self.sin_TD)


class _Rotate(torch.autograd.Function):
    """One rotation; its gradient is the opposite one, so nothing but the table is kept."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotate(x_THD, cos_TD, sin_TD, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos_TD, sin_TD, -1.0), None, None


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: float) -> Tensor:
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x, cos_T1D, sin_T1D = (y.to(wide) for y in (x_THD, cos_TD[:, None], sin_TD[:, None]))
    half = x.shape[-1] // 2
    turned = x * cos_T1D
    turned[..., :half].addcmul_(x[..., half:], sin_T1D[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin_T1D[..., half:], value=sign)
    return turned.to(x_THD.dtype)
