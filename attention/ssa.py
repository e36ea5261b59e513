"""SSA: a dense and a sparse stream of attention, drawn to each other while one of them goes on.

Sparse Sparse Attention (arXiv 2511.20102). Both streams come from the same layer input, and both
learn: the one that goes on from the loss, the other one from the alignment.
Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..kernels.alignment import align
from ..kernels.selection_rule import SelectionRule
from .context import Context
from .mean_keys import choose_by_mean_keys
from .mechanism_settings import SsaSettings
from .probe import in_blocks
from .site import Site


class Ssa(nn.Module):
    """Dense and block-sparse attention with one sigmoid gate per head behind both.

    The released code draws the stream from Python's own generator, lets packed documents see each
    other in the sparse stream, and takes the mean of the alignment over local tokens. Here the draw
    belongs to the micro-batch, both streams stay inside documents, and the alignment is a sum over
    tokens that the trainer divides by their global number.
    """

    needs_hidden = True

    def __init__(self, settings: SsaSettings, site: Site) -> None:
        super().__init__()
        self.settings, self.site = settings, site
        self.gate = site.parameter(site.heads, site.hidden, by_head=True)

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        assert hidden_SE is not None
        settings = self.settings
        gate_TH1 = linear(ctx.of_rows(hidden_SE), self.gate).sigmoid().unsqueeze(-1)
        ctx.measure("gate", gate_TH1)
        q_THD, k_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)

        def stream(sparse: bool, count: int) -> Tensor:
            blocks = None
            if sparse:
                # The query's own block is always among them.
                rule, block = SelectionRule(count, local=1), settings.block
                blocks = ctx.choose(
                    "blocks", lambda: choose_by_mean_keys(q_THD, k_SGD, block, rule, ctx)
                )
                ctx.look(q_THD, k_SGD, in_blocks(blocks))
            return ctx.attend(q_THD, k_SGD, v_SGV, ctx.reach, blocks)[0] * gate_TH1

        if not ctx.training:
            return stream(settings.evaluate == "sparse", settings.evaluate_count or settings.count)
        # The same for all layers: the whole model is in one mode.
        sparse = ctx.draw("ssa") < settings.sparse_share
        out_THV = stream(sparse, settings.count)
        # The first of a recomputed layer's two passes needs nothing of the other stream.
        if not settings.align or not torch.is_grad_enabled():
            return out_THV
        other_THV = stream(not sparse, settings.count)
        return _Aligned.apply(out_THV, other_THV, self._alignment(ctx))

    def _alignment(self, ctx: Context) -> _Alignment:
        site, settings = self.site, self.settings
        factor = settings.align / site.layers_alike
        width = site.all_heads * site.dim
        return _Alignment(ctx.weights_T, factor, settings.beta, width, ctx)


@dataclass(frozen=True, eq=False)
class _Alignment:
    """How two streams are drawn to each other.

    Attributes:
        weights_T: Of the rows.
        factor: Of the loss: its weight over the layers that have one.
        beta: Where SmoothL1 turns from square to linear.
        width: Elements of a row in the whole layer.
        ctx: Where the loss is left.
    """

    weights_T: Tensor
    factor: float
    beta: float
    width: int
    ctx: Context


class _Aligned(torch.autograd.Function):
    """The first output, with the alignment's gradients for both on the way back.

    Everything is computed there, so that nothing is kept and nothing computed twice.
    """

    @staticmethod
    def forward(ctx: Any, out_THV: Tensor, other_THV: Tensor, how: _Alignment) -> Tensor:
        ctx.save_for_backward(out_THV, other_THV)
        ctx.how = how
        return out_THV.view_as(out_THV)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        out_THV, other_THV = ctx.saved_tensors
        how: _Alignment = ctx.how
        found = align(out_THV, other_THV, how.weights_T, beta=how.beta, width=how.width)
        weight = how.weights_T.sum()
        how.ctx.notes.add("alignment", found.total, weight, part=True)
        # The mean over tensor ranks shall be the sum of their parts.
        whole = found.total * (how.width / out_THV.shape[1:].numel())
        how.ctx.measure("alignment", whole / weight.clamp(min=1.0))
        dout_THV = grad_outputs[0] + found.da_THV.mul_(how.factor).to(out_THV.dtype)
        return dout_THV, found.db_THV.mul_(how.factor).to(other_THV.dtype), None
