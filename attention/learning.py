"""Learning: what indexers and gates learn from a loss of their own, beside the model's.

Their inputs are detached, so that neither loss reaches what the other is for, and the loss of a
layer needs nothing from the layers after it: its backward runs in the layer's forward.
Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.attention_map import AttentionMap, Fold
from ..kernels.scoring import Scoring
from .context import Context


def map_to_learn(
    q_THD: Tensor,
    k_SGD: Tensor,
    lse_TH: Tensor,
    ctx: Context,
    maps: int,
    folds: tuple[Fold, Fold] = ("sum", "sum"),
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> AttentionMap:
    """The map of an attention as a target, without a way back to the model.

    Args:
        q_THD: Queries, turned.
        k_SGD: Keys, turned.
        lse_TH: The lse of their attention.
        ctx: For the scale of the scores.
        maps: How many maps the heads are folded into.
        folds: How heads become one, and the keys of a block.
        reduce: Folds over the tensor ranks; see `AttentionMap`.
    """
    q_THD, k_SGD, lse_TH = q_THD.detach(), ctx.gather(k_SGD.detach()), lse_TH.detach()
    scoring = Scoring(ctx.scale_of(q_THD))
    return AttentionMap(q_THD, k_SGD, lse_TH, scoring, maps, *folds, reduce=reduce)


def learn(outputs: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
    """Adds to `.grad` of the parameters that outputs were computed from, at once.

    Works wherever the forward runs: without gradients outside, or inside of another backward.

    Args:
        outputs: Computed with gradients enabled; those without a parameter that learns are left.
        gradients: Of the loss, one for each output.
        weight: Of the loss.
    """
    pairs = zip(outputs, gradients, strict=True)
    learning = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    if learning:
        torch.autograd.backward(
            [output for output, _ in learning],
            [(gradient * weight).to(output.dtype) for output, gradient in learning],
        )
