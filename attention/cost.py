"""Cost: the FLOPs of one layer's attention over one document, from settings alone. No torch.

A product of matrices counts, 2 per multiplication; what is done element by element does not. A
key is as wide as a value. Projections of the layer itself are not part of it, those that a
mechanism brings along are.
Shapes: E hidden channels, H query heads, G key-value heads, D head dim, I index or gate dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .layer_settings import AttentionSettings
from .mechanism_settings import (
    IndexerSettings,
    InfllmV2Settings,
    MechanismSettings,
    MobaSettings,
    NsaSettings,
    SeerSettings,
    SsaSettings,
)
from .pairs import (
    blocks_met,
    chosen,
    dense,
    ssa_streams,
    visible_pairs,
    whole_blocks,
    windows,
    windows_seen,
)
from .parameters import LayerShape, compression, gate_parameters, index_parameters, linears


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass, by who has a gradient.

    Attributes:
        model: Of the model's own output.
        choice: Of scores that choose, and of the maps that are learned from: without gradient.
        learner: Of what an indexer or a gate predicts in order to learn.
    """

    model: float
    choice: float = 0
    learner: float = 0

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return self.model + self.choice + self.learner

    def training(self, *, frozen: bool = False) -> float:
        """FLOPs of forward and backward; a backward is twice its forward.

        Nothing is counted for what a kernel or a layer computes again.

        Args:
            frozen: Whether the model stands still and only a selection learns.
        """
        return self.model * (1 if frozen else 3) + self.choice + 3 * self.learner


def attention_cost(
    attention: AttentionSettings,
    mechanism: MechanismSettings,
    shape: LayerShape,
    tokens: int,
    *,
    learning: bool = True,
) -> Cost:
    """The cost of a layer's attention over one document.

    Args:
        attention: Of the stage.
        mechanism: Of the layer.
        shape: Of the layer.
        tokens: Of the document.
        learning: While weights are learned; otherwise in evaluations. A prompt, not the tokens
            after it: each of those costs the difference of two lengths.
    """
    heads, dim = shape.heads, shape.dim
    pairs = visible_pairs(mechanism, tokens, heads, shape.groups, learning=learning)
    # Scores and the sum of values.
    model = 2 * pairs * 2 * dim + 2 * tokens * linears(attention, mechanism, shape)
    # What the scores of all heads cost for one query and key.
    score = 2 * heads * dim
    match mechanism:
        case NsaSettings(compress_length=length, compress_stride=stride):
            model += _compression(mechanism, shape, tokens)
            # The lse is known from the compressed branch.
            return Cost(model, score * windows_seen(tokens, length, stride))
        case InfllmV2Settings():
            return Cost(model, score * _pooled_scores(mechanism, tokens))
        case SsaSettings(block=block):
            # Once for the lse, and once for the probabilities.
            _, sparse = ssa_streams(mechanism, learning)
            return Cost(model, score * 2 * sparse * windows_seen(tokens, block, block))
        case MobaSettings(block=block):
            return Cost(model, score * windows_seen(tokens, block, block))
        case SeerSettings():
            return _with_gate(mechanism, shape, tokens, model, learning)
        case IndexerSettings():
            return _with_index(mechanism, shape, tokens, model, learning)
        case _:
            return Cost(model)


def _compression(mechanism: NsaSettings, shape: LayerShape, tokens: int) -> int:
    """Keys and values of the windows; their means and weighted sums are no products."""
    if mechanism.compress in ("mean", "weighted"):
        return 0
    made = windows(tokens, mechanism.compress_length, mechanism.compress_stride)
    return 2 * 2 * made * compression(mechanism, shape)


def _pooled_scores(mechanism: InfllmV2Settings, tokens: int) -> int:
    """Pairs of a query and a pooled key that are scored: for the normaliser, and to choose."""
    if tokens < mechanism.dense_below:
        return 0
    length, stride = mechanism.compress_length, mechanism.compress_stride
    coarse = mechanism.coarse or 1
    to_choose = windows_seen(tokens, length, stride)
    return to_choose + windows_seen(tokens, coarse * length, coarse * stride)


def _with_gate(
    mechanism: SeerSettings, shape: LayerShape, tokens: int, model: float, learning: bool
) -> Cost:
    """SeerAttention: a map and its prediction while it learns, in evaluations the prediction."""
    block, by_block = mechanism.block, mechanism.form == "block"
    blocks = -(-tokens // block)
    of_query, of_key = gate_parameters(mechanism, shape)
    projected = 2 * ((blocks if by_block else tokens) * of_query + blocks * of_key)
    score = 2 * mechanism.dim * (shape.heads if by_block else shape.groups)
    if not learning:
        if mechanism.evaluate == "dense":
            return Cost(model)
        # A threshold needs the normaliser as well.
        scores = _gate_pairs(mechanism, tokens) * (2 if mechanism.evaluate == "threshold" else 1)
        return Cost(model, projected + score * scores)
    before = tokens - math.ceil(tokens * mechanism.rows)
    if by_block:
        before = -(-before // block) * block
        seen = dense(tokens) - dense(before)
    else:
        seen = whole_blocks(tokens, block) - whole_blocks(before, block)
    scores = _gate_pairs(mechanism, tokens) - _gate_pairs(mechanism, before)
    return Cost(model, 2 * shape.heads * shape.dim * seen, projected + score * scores)


def _gate_pairs(mechanism: SeerSettings, tokens: int) -> int:
    """Pairs of a query, or a block of queries, and a block that the gate scores."""
    if mechanism.form == "block":
        return dense(-(-tokens // mechanism.block))
    return whole_blocks(tokens, mechanism.block) // mechanism.block


def _with_index(
    mechanism: IndexerSettings, shape: LayerShape, tokens: int, model: float, learning: bool
) -> Cost:
    """An indexer: scores of all keys that choose, and again those that it learns from."""
    choices = 1 if mechanism.share == "all_heads" else shape.groups
    score = 2 * choices * mechanism.heads * mechanism.dim
    projected = 2 * tokens * index_parameters(mechanism, shape)
    chooses = mechanism.attend == "chosen"
    scored = _index_pairs(mechanism, tokens) if chooses else 0
    if not learning:
        return Cost(model, (projected if chooses else 0) + score * scored)
    pairs = visible_pairs(mechanism, tokens, 1, 1)
    target = 2 * shape.heads * shape.dim * pairs
    return Cost(model, score * scored + target, projected + score * pairs)


def _index_pairs(mechanism: IndexerSettings, tokens: int) -> int:
    """Pairs of a query and a key (or a pooled key of HISA) that are scored."""
    hisa = mechanism.hisa
    if hisa is None:
        return dense(tokens)
    return blocks_met(tokens, hisa.block) + chosen(tokens, hisa.block, hisa.budget)
