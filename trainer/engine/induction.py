"""The start of a small model that copies: a previous-token head and a matching head.

A head of the first layer writes beside every token the one before it; a head of the second looks
for places where the current token came before, and predicts what followed. Models find this pair by
themselves, after billions of tokens (Olsson et al. 2022, arXiv 2209.11895); one that is trained for
minutes does not, and has then no use for a long context. Both heads go on learning.

Shapes: E hidden width, D head width, N channels that carry the token before.
"""

from __future__ import annotations

import torch

from ...attention.rope import attention_factor, inverse_frequencies
from ...attention.settings import RopeSettings
from ..settings import ModelSettings

_FAST_PAIRS = 3
"""Channel pairs, from the fastest on, that find the token before by its position."""

_POSITION_SCORE = 6.0
"""What each of them adds to the attention score of the token before."""

_MATCH_SCORE = 16.0
"""Attention score of a place that was preceded by the current token."""

_FAINT = 0.1
"""Factor on the random part of a query or key that shall not disturb."""


class InductionStart:
    """Overwrites the first query head of the first key-value head in the first two layers.

    Args:
        model: Two layers or more, biases on q, k and v, tied embeddings, no QK-norm, and a head
            width from 16 to `hidden`; the recipe's check has seen to it.
        rope: Of the stage that the weights start in; all channels of the first layer turn.
        length: Tokens in a sequence of that stage.
        generator: Of the random subspaces; the same on every rank.
    """

    def __init__(
        self, model: ModelSettings, rope: RopeSettings, length: int, generator: torch.Generator
    ) -> None:
        self.width, self.std = model.head_width, model.init_std
        self.key_row = model.heads // model.kv_heads * self.width
        self.turns = inverse_frequencies(rope, self.width, length)
        # Queries and keys that turn are multiplied by this before they meet.
        self.gain = attention_factor(rope, length)
        self.match_gain = 1.0 if 1 in rope.nope_layers else self.gain
        pairs = self.width // 2
        slow = torch.arange(pairs // 2, pairs)
        self.slow_N = torch.cat([slow, slow + pairs])
        carried = len(self.slow_N)

        def orthonormal(columns: int) -> torch.Tensor:
            draw = torch.randn(model.hidden, columns, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(draw).Q.float()

        self.read_NE = orthonormal(carried).T
        self.write_EN = orthonormal(carried)
        self.copy_DE = orthonormal(self.width).T

    def fill(self, name: str, full: torch.Tensor) -> None:
        """Change the whole tensor of a parameter in place, if it belongs to these heads.

        Args:
            name: `layer.<number>.` and the parameter's name within its layer.
            full: The tensor before it is split over tensor ranks.
        """
        fill = {
            "layer.0.self_attention.linear_qkv.bias": self._position,
            "layer.0.self_attention.linear_qkv.weight": self._previous,
            "layer.0.self_attention.linear_proj.weight": self._note,
            "layer.1.self_attention.linear_qkv.weight": self._match,
            "layer.1.self_attention.linear_proj.weight": self._copy,
        }.get(name)
        if fill is not None:
            fill(full)

    def _query_key_value(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the head's rows."""
        key, width = self.key_row, self.width
        return full[:width], full[key : key + width], full[key + width : key + 2 * width]

    def _position(self, bias: torch.Tensor) -> None:
        """A key that turns with its position, a query that has turned one token less."""
        query_D, key_D, _ = self._query_key_value(bias)
        size = (_POSITION_SCORE * self.width**0.5) ** 0.5 / self.gain
        for pair in range(_FAST_PAIRS):
            key_D[pair] = size
            query_D[pair] = size * self.turns[pair].cos()
            query_D[pair + self.width // 2] = -size * self.turns[pair].sin()

    def _previous(self, weight: torch.Tensor) -> None:
        query_DE, key_DE, value_DE = self._query_key_value(weight)
        query_DE *= _FAINT
        key_DE *= _FAINT
        value_DE[: len(self.read_NE)] = self.read_NE

    def _note(self, weight: torch.Tensor) -> None:
        """Written as large as the embedding it joins in the residual stream."""
        weight[:, : len(self.read_NE)] = self.write_EN * self.std

    def _match(self, weight: torch.Tensor) -> None:
        query_DE, key_DE, value_DE = self._query_key_value(weight)
        query_DE *= _FAINT
        key_DE *= _FAINT
        size = (_MATCH_SCORE * self.width**0.5 / len(self.slow_N)) ** 0.5 / self.match_gain
        # Only channels that hardly turn over the context can match at any distance.
        query_DE[self.slow_N] = self.read_NE * size
        key_DE[self.slow_N] = self.write_EN.T * size
        value_DE[:] = self.copy_DE

    def _copy(self, weight: torch.Tensor) -> None:
        """Tied embeddings turn what was read from a token into a vote for it."""
        weight[:, : self.width] = self.copy_DE.T * self.std
