"""Rotary position embedding in the rotate-half convention (GPT-NeoX; Hugging Face Llama).

RoFormer (Su et al. 2021, arXiv 2104.09864). Channel i of the first half of the turning channels
turns with channel i of their second half. Shapes: T tokens, H heads, D head dim, R turning
channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.transfer import to_device
from .frequencies import attention_factor, frequencies
from .settings import RopeSettings


def inverse_frequencies(settings: RopeSettings, head_dim: int, length: int) -> Tensor:
    """Radians per token of each channel pair, fp32 [R / 2], computed in fp64.

    Args:
        settings: The kind of RoPE.
        head_dim: Channels of one head.
        length: Tokens in a sequence of the stage.

    Raises:
        LongspanError: The channels do not fit the kind.
    """
    return torch.tensor(frequencies(settings, head_dim, length), dtype=torch.float32)


class Rotation(Protocol):
    """How positions enter queries and keys."""

    def apply(self, x_THD: Tensor) -> Tensor:
        """Queries or keys with their positions."""
        ...


class NoRotation:
    """Of layers whose queries and keys know no position (NoPE)."""

    def apply(self, x_THD: Tensor) -> Tensor:
        """`x_THD` itself."""
        return x_THD


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of the tokens of one micro-batch, times the attention factor.

    Attributes:
        cos_TR: fp32, both halves of R alike.
        sin_TR: fp32, both halves of R alike.
    """

    cos_TR: Tensor
    sin_TR: Tensor

    @classmethod
    def build(
        cls, positions_T: Tensor, settings: RopeSettings, head_dim: int, length: int
    ) -> RotaryTable:
        """The table for `positions_T`, on their device.

        Args:
            positions_T: Positions within the document, int64.
            settings: The kind of RoPE.
            head_dim: Channels of one head.
            length: Tokens in a sequence of the stage, however many tokens there are here.
        """
        turns = to_device(inverse_frequencies(settings, head_dim, length), positions_T.device)
        # fp32 angles are off by up to 0.03 radians at a million tokens.
        angle_TR = torch.outer(positions_T.double(), turns.double()).repeat(1, 2)
        factor = attention_factor(settings, length)
        return cls((angle_TR.cos() * factor).float(), (angle_TR.sin() * factor).float())

    def apply(self, x_THD: Tensor) -> Tensor:
        """`x_THD` turned by each token's position; computed in fp32, returned in its dtype.

        The attention factor scales the channels that turn; the others stay as they are.
        """
        return _Rotate.apply(x_THD, self.cos_TR, self.sin_TR)


@dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys of a stage; not at all in a layer without RoPE.

    Attributes:
        settings: The kind of RoPE.
        length: Tokens in a sequence of the stage.
        turns: False in layers whose queries and keys know no position (NoPE).
    """

    settings: RopeSettings
    length: int
    turns: bool = True

    def at(self, positions_T: Tensor, dim: int, share: float | None = None) -> Rotation:
        """The rotation of tokens at these positions, on their device.

        Args:
            positions_T: Positions within the document, int64.
            dim: Channels of one head.
            share: Of the channels that turn; None for the share of the settings.
        """
        if not self.turns:
            return NoRotation()
        settings = self.settings
        if share is not None:
            settings = settings.model_copy(update={"rotary_share": share})
        return RotaryTable.build(positions_T, settings, dim, self.length)


class _Rotate(torch.autograd.Function):
    """One rotation; its gradient is the opposite one, so nothing but the table is kept.

    The factor in the table needs no care: the transpose of a scaled rotation has the same scale.
    """

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return _rotate(x_THD, cos_TR, sin_TR, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos_TR, sin_TR, -1.0), None, None


def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: float) -> Tensor:
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x_THR, rest_THX = x_THD.tensor_split([cos_TR.shape[-1]], dim=-1)
    x, cos_T1R, sin_T1R = (y.to(wide) for y in (x_THR, cos_TR[:, None], sin_TR[:, None]))
    half = x.shape[-1] // 2
    turned = x * cos_T1R
    turned[..., :half].addcmul_(x[..., half:], sin_T1R[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin_T1R[..., half:], value=sign)
    turned = turned.to(x_THD.dtype)
    return torch.cat([turned, rest_THX], dim=-1) if rest_THX.shape[-1] else turned
