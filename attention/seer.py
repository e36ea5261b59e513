"""Seer: a gate that learns which blocks a dense model looks at, for sparse evaluations of it.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim, E hidden
channels; B blocks of keys, Q queries of the gate (T, or blocks of queries), C its heads (G, or H),
I its dim, N chosen blocks, X any dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import LongspanError
from ..kernels.attend import attend
from ..kernels.blocks import Blocks
from ..kernels.gate import Gate
from ..kernels.map_loss import gate_loss
from ..kernels.mirror import Mirror
from ..kernels.pool import pool
from ..kernels.precision import wide
from ..kernels.query_groups import QueryGroups
from ..kernels.reach import Reach
from ..kernels.selection import select_blocks
from ..kernels.selection_rule import SelectionRule
from ..kernels.windows import Windows
from .context import Context
from .documents import Documents
from .learning import learn, map_to_learn
from .mechanism_settings import SeerSettings
from .probe import in_blocks
from .site import Site

# Numbers of one temporary while probabilities are compared with the threshold.
ELEMENTS = 2**22


class Seer(nn.Module):
    """SeerAttention-R (arXiv 2506.08889; form token) and SeerAttention (arXiv 2410.13276; block).

    Attention is dense while the model trains, and the gate learns the largest weights of blocks:
    for each query and key-value head those of the complete blocks before the query's own, which is
    always visible and never scored, as its pooled key knows later tokens; in form block for each
    block of queries and each query head, as in that paper, those of all blocks up to its own.

    Args:
        settings: Of the layer.
        site: Where it works.

    Attributes:
        causal: Whether no token bears on the choices of earlier ones; not so in form block.
    """

    needs_hidden = False

    def __init__(self, settings: SeerSettings, site: Site) -> None:
        super().__init__()
        self.settings, self.site = settings, site
        self.causal = settings.form == "token"
        self.heads = site.groups if self.causal else site.heads
        width = site.dim * (site.share if self.causal else 1)
        self.query = site.parameter(self.heads, settings.dim, width, by_head=True)
        self.key = site.parameter(site.groups, settings.dim, 3 * site.dim, by_head=True)

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        turned = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        dense = ctx.training or ctx.learns or self.settings.evaluate == "dense"
        blocks = None
        if not dense:
            blocks = ctx.choose("gate", lambda: self._choose(self._gate(q_THD, k_SGD, ctx), ctx))
        out_THV, lse_TH = ctx.attend(*turned, v_SGV, ctx.reach, blocks)
        if ctx.learns:
            gate = self._gate(q_THD, k_SGD, ctx)
            self._learn(gate, *turned, lse_TH, ctx)
            if ctx.probe is not None:  # what it would choose in an evaluation
                ctx.look(*turned, in_blocks(self._choose(gate, ctx)))
        return out_THV

    def _gate(self, q_THD: Tensor, k_SGD: Tensor, ctx: Context) -> Gate:
        """Queries and keys before RoPE as those of the gate, with a way back to its parameters."""
        documents, block = ctx.documents, self.settings.block
        if not self.causal and not documents.whole:
            raise LongspanError(
                "seer with form: block lets the queries of a block choose together, so that it "
                "cannot generate token by token",
                fix="use form: token, or evaluate: dense",
            )
        windows = _windows(documents, block)
        with torch.set_grad_enabled(ctx.learns):
            q_THD = q_THD.detach()
            k_BGX = ctx.pooled(k_SGD.detach(), windows, _summary)
            k_BGI = torch.einsum("bgx,gix->bgi", k_BGX, self.key)
            by_block = ctx.turning(f"blocks of {block}", lambda: _places(documents, block), k_BGI)
            k_BCI = by_block.apply(k_BGI)
            if self.causal:
                q_TCX = q_THD.unflatten(1, (self.heads, -1)).flatten(2)
                q_QCI = ctx.turn_queries(torch.einsum("tcx,cix->tci", q_TCX, self.query))
            else:
                q_QCX = pool(q_THD, windows, "mean")
                q_QCI = by_block.apply(torch.einsum("qcx,cix->qci", q_QCX, self.query))
                k_BCI = k_BCI.repeat_interleave(self.site.share, dim=1)
        return Gate(q_QCI, k_BCI, self.settings.dim**-0.5)

    def _learn(
        self, gate: Gate, q_THD: Tensor, k_SGD: Tensor, lse_TH: Tensor, ctx: Context
    ) -> None:
        """Learn from the last rows of each document."""
        settings, documents = self.settings, ctx.documents
        key = "seer learns", settings.form, settings.block, settings.rows
        reach = documents.once(key, lambda: _reach_to_learn(documents, settings))
        grid, groups, weight_Q = documents.grid(settings.block), None, ctx.weights_T
        if not self.causal:
            groups = QueryGroups(grid.starts_B1)
            starts = grid.mirror.on(weight_Q.device).long()
            # All tokens of a block of queries have its divergence.
            weight_Q = torch.segment_reduce(weight_Q, "sum", offsets=starts, unsafe=True)
        target = map_to_learn(q_THD, k_SGD, lse_TH, ctx, self.heads, ("max", "max"))
        loss, gradients = gate_loss(target, gate, reach, grid, weight_Q, groups=groups)
        ranks = self.site.all_heads / self.site.heads
        ctx.notes.add("gate_loss", loss.total, loss.weight * ranks, part=True)
        learn([gate.q_TCD, gate.k_BED], [gradients.dq_TCD, gradients.dk_BED], settings.weight)

    def _choose(self, gate: Gate, ctx: Context) -> Blocks:
        """The best blocks of each query, or of each block of queries, its own among them."""
        settings, documents = self.settings, ctx.documents
        grid, windows = documents.grid(settings.block), _windows(documents, settings.block)
        reach = ctx.reach if self.causal else QueryGroups(grid.starts_B1).reach(ctx.reach)
        rule = SelectionRule(settings.count, local=1, statistic="logit", heads="none")
        blocks = select_blocks(gate.q_TCD, gate.k_BED, windows, grid, reach, rule, scale=gate.scale)
        if settings.threshold is not None:
            first_Q, last_Q = grid.span(reach)
            scored = Reach(first_Q, last_Q - 1 if self.causal else last_Q)
            ids_QCN = _likely(blocks.ids_QCN, gate, scored, last_Q - 1, settings.threshold)
            blocks = replace(blocks, ids_QCN=ids_QCN)
        return blocks if self.causal else replace(blocks, query_starts=grid.starts_B1)


def _summary(k_SGD: Tensor, windows: Windows) -> Tensor:
    """The largest and the smallest entries of each window of keys, and their mean, [B, G, 3 D]."""
    return torch.cat([pool(k_SGD, windows, how) for how in ("max", "min", "mean")], -1)


@torch.no_grad()
def _likely(ids_QCN: Tensor, gate: Gate, scored: Reach, own_Q: Tensor, threshold: float) -> Tensor:
    """The choices without those of too little probability, in the softmax over `scored` blocks."""
    q_QCI, k_BCI = gate.q_TCD, gate.k_BED
    _, lse_QC = attend(q_QCI, k_BCI, k_BCI, scored, scale=gate.scale)
    own_Q11 = Mirror(own_Q).on(ids_QCN.device)[:, None, None]
    head_C1 = torch.arange(k_BCI.shape[1], device=ids_QCN.device)[:, None]
    kept_QCN = torch.full_like(ids_QCN, -1)
    step = max(1, ELEMENTS // max(1, ids_QCN[0].numel() * k_BCI.shape[2]))
    for start in range(0, len(ids_QCN), step):
        some = slice(start, start + step)
        ids_MCN = ids_QCN[some]
        k_MCNI = wide(k_BCI[ids_MCN.clamp(min=0).long(), head_C1])
        logits_MCN = torch.einsum("mci,mcni->mcn", wide(q_QCI[some]), k_MCNI) * gate.scale
        likely_MCN = logits_MCN - lse_QC[some, :, None] >= math.log(threshold)
        kept_QCN[some] = ids_MCN.masked_fill(~(likely_MCN | (ids_MCN == own_Q11[some])), -1)
    return kept_QCN


def _windows(documents: Documents, block: int) -> Windows:
    """The blocks of `Documents.grid`; nobody scores an incomplete one before it is its own."""
    key = "blocks as windows", block
    cu = documents.cu_seqlens
    return documents.once(key, lambda: Windows.documents(cu, block, block, tail=True))


def _places(documents: Documents, block: int) -> Tensor:
    """Where each block begins within its document, int64 [B] on the host."""
    cu, starts_B = torch.tensor(documents.cu_seqlens), documents.grid(block).starts_B1[:-1]
    return starts_B - cu[torch.searchsorted(cu, starts_B, right=True) - 1]


def _reach_to_learn(documents: Documents, settings: SeerSettings) -> Reach:
    """What the gate scores for each row, nothing for rows that it does not learn from."""
    block, length_T, first_T = settings.block, documents.lengths(), documents.starts()
    place_T = documents.rows() - first_T
    begin_T = place_T - place_T % block
    # A block of queries learns as a whole.
    row_T = place_T if settings.form == "token" else begin_T
    last_T = first_T + begin_T if settings.form == "token" else documents.reach().last_T
    learns_T = row_T >= length_T - (length_T.double() * settings.rows).ceil().long()
    return Reach(first_T, torch.where(learns_T, last_T, first_T))
