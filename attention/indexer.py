"""Indexer: small heads that learn from the attention's map which keys each query should see.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim; C choosers (1, or a key-value head each), J index heads of a chooser, I index dim.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from ..kernels.blocks import Blocks
from ..kernels.index_selection import select_index_blocks, select_tokens_in_blocks
from ..kernels.indexer import Index
from ..kernels.map_loss import index_loss
from ..kernels.precision import wide
from .context import Context
from .learning import learn, map_to_learn
from .mechanism_settings import IndexerSettings
from .probe import in_blocks
from .site import Site

EPSILON = 1e-6


class Indexer(nn.Module):
    """DeepSeek sparse attention (arXiv 2512.02556) for grouped heads, and MSA (arXiv 2606.13392).

    The score of a query and a key is sum_j w_j * relu(q_j . k) / sqrt(J * I), from the layer's
    normalised input. One choice serves all heads, by the sum of their maps, or each key-value head
    has its own. The indexer learns from a divergence that is a sum over query rows and choosers.

    Args:
        settings: Of the layer.
        site: Where it works.
    """

    needs_hidden = True

    def __init__(self, settings: IndexerSettings, site: Site) -> None:
        super().__init__()
        self.settings, self.site = settings, site
        self.by_head = settings.share == "kv_head"
        self.choosers = site.groups if self.by_head else 1
        heads, hidden = self.choosers * settings.heads, site.hidden
        self.query = site.parameter(heads * settings.dim, hidden, by_head=self.by_head)
        self.key = site.parameter(settings.dim, hidden)
        self.key_norm = site.parameter(settings.dim, start=1.0)
        self.key_bias = site.parameter(settings.dim, start=0.0)
        # The weight of a lone index head (MSA) could only stretch what its query says.
        lone = settings.heads == 1
        self.weight = None if lone else site.parameter(heads, hidden, by_head=self.by_head)

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
        index, blocks = self._index(hidden_SE, ctx) if ctx.learns else None, None
        if self.settings.attend == "chosen":
            blocks = ctx.choose(
                "index", lambda: self._choose(index or self._index(hidden_SE, ctx), ctx)
            )
        q_THD, k_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        if ctx.probe is not None and index is not None:
            # In a warm-up too: what it would choose.
            ctx.look(q_THD, k_SGD, in_blocks(blocks or self._choose(index, ctx)))
        out_THV, lse_TH = ctx.attend(q_THD, k_SGD, v_SGV, ctx.reach, blocks)
        if index is not None:
            self._learn(index, q_THD, k_SGD, lse_TH, blocks, ctx)
        return out_THV

    def _index(self, hidden_SE: Tensor, ctx: Context) -> Index:
        """What scores, with a way back to the parameters (and no further) if it learns."""
        settings, shape = self.settings, (self.choosers, self.settings.heads)
        with torch.set_grad_enabled(ctx.learns):
            hidden_SE = hidden_SE.detach()
            hidden_TE = ctx.of_rows(hidden_SE)
            q_TCJI = self._turned(linear(hidden_TE, self.query), "T", ctx).unflatten(1, shape)
            k_SI = wide(linear(hidden_SE, self.key))
            norm = wide(self.key_norm), wide(self.key_bias)
            k_SI = layer_norm(k_SI, (settings.dim,), *norm, EPSILON).to(hidden_SE.dtype)
            k_S1I = self._turned(k_SI, "T" if ctx.positions_S is ctx.positions_T else "S", ctx)
            k_S1I = ctx.gather(k_S1I)
            weight_TCJ = None
            if self.weight is not None:
                weight_TCJ = linear(hidden_TE, self.weight).unflatten(1, shape)
        scale = (settings.heads * settings.dim) ** -0.5
        return Index(q_TCJI, k_S1I, weight_TCJ, scale, settings.relu)

    def _turned(self, x_NY: Tensor, name: str, ctx: Context) -> Tensor:
        """[N, Y / I, I] with the positions of queries (T) or keys (S)."""
        positions = ctx.positions_T if name == "T" else ctx.positions_S
        x_NYI = x_NY.unflatten(1, (-1, self.settings.dim))
        return ctx.turning(name, lambda: positions, x_NYI, self.settings.rotary_share).apply(x_NYI)

    def _choose(self, index: Index, ctx: Context) -> Blocks:
        settings, documents, hisa = self.settings, ctx.documents, self.settings.hisa
        if hisa is None:
            grid = documents.grid(settings.block)
            return select_index_blocks(index, ctx.reach, grid, settings.count, local=settings.local)
        grid = documents.grid(hisa.block)
        return select_tokens_in_blocks(
            index, ctx.reach, settings.count, grid, hisa.budget, pool=hisa.pool
        )

    def _learn(
        self,
        index: Index,
        q_THD: Tensor,
        k_SGD: Tensor,
        lse_TH: Tensor,
        blocks: Blocks | None,
        ctx: Context,
    ) -> None:
        """Learn from the attention's map over what it saw."""
        site, parts = self.site, self.site.heads != self.site.all_heads
        # All ranks compute the one map of all heads, and so the same gradients.
        reduce = site.total if parts and not self.by_head else None
        target = map_to_learn(q_THD, k_SGD, lse_TH, ctx, self.choosers, reduce=reduce)
        over = ctx.documents.grid(self.settings.block) if blocks is None else blocks
        loss, gradients = index_loss(target, index, ctx.reach, over, ctx.weights_T)
        ranks = site.all_heads / site.heads if self.by_head else 1.0
        ctx.notes.add("index_loss", loss.total, loss.weight * ranks, part=self.by_head)
        dk_S1I = gradients.dk_SED
        if self.by_head:
            # The key serves the choosers of all ranks, each of which has its part of the loss.
            dk_S1I = site.total(dk_S1I)
        outputs, found = [index.q_TCJD, index.k_SED], [gradients.dq_TCJD, dk_S1I]
        if index.weight_TCJ is not None:
            outputs.append(index.weight_TCJ)
            found.append(cast(Tensor, gradients.dweight_TCJ))
        learn(outputs, found, self.settings.weight)
