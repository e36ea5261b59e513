"""Sharded heads: all heads see the near blocks, and each of them another part of the far ones.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim; R heads and K key-value heads of a shard, F keys that it sees, N = F * K of all shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.mirror import Mirror
from ..kernels.reach import Reach
from .context import Context
from .documents import Documents
from .mechanism_settings import ShardedHeadsSettings
from .merging import merge_outputs
from .sharding import residue
from .site import Site


class ShardedHeads(nn.Module):
    """Heterogeneous block-sparse attention (S2-Attention, arXiv 2407.17678).

    Block kb <= qb of a document is visible to the queries of its block qb if qb - kb < local or if
    kb % stride is the head's residue.
    """

    needs_hidden = False

    def __init__(self, settings: ShardedHeadsSettings, site: Site) -> None:
        super().__init__()
        self.settings = settings
        self.shards = _shards(settings, site)

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        settings, documents = self.settings, ctx.documents
        q_THD, k_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        blocks = settings.block, settings.local
        near = documents.restricted(("near blocks", *blocks), lambda every: _near(every, *blocks))
        near = ctx.attend(q_THD, k_SGD, v_SGV, near)
        ctx.look(q_THD, k_SGD, self._seen)
        key = "far blocks", *blocks, settings.stride, self.shards, k_SGD.shape[1]
        far = documents.once(key, lambda: self._far(documents, k_SGD.shape[1]))
        if not sum(far.sizes):
            return near[0]
        return merge_outputs([near, self._attend_far(q_THD, k_SGD, v_SGV, far, ctx)])

    def _attend_far(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, far: Far, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, V] and lse [T, H] over the far blocks, shard by shard."""
        device = q_THD.device
        # One gather for all shards: its gradient is one sum instead of one per shard.
        k_of, v_of = (ctx.gather_some(x, far.keys).split(far.sizes) for x in (k_SGD, v_SGV))
        heads = [len(shard.heads) for shard in self.shards]
        q_of = q_THD.index_select(1, far.order.on(device)).split(heads, 1)
        parts = [
            ctx.attend(
                q_TRD,
                k_ND.view(-1, len(shard.groups), k_ND.shape[1]),
                v_NV.view(-1, len(shard.groups), v_NV.shape[1]),
                reach,
                sinks=False,
                here=True,
            )
            for shard, reach, q_TRD, k_ND, v_NV in zip(
                self.shards, far.reaches, q_of, k_of, v_of, strict=True
            )
        ]
        back_H = far.back.on(device)
        out_THV = torch.cat([out_TRV for out_TRV, _ in parts], 1).index_select(1, back_H)
        return out_THV, torch.cat([lse_TR for _, lse_TR in parts], 1).index_select(1, back_H)

    def _seen(self, row: int, first: int, last: int) -> Tensor:
        """Which keys of its document a query sees, for the probe: bool [H, n]."""
        del row
        block_n = torch.arange(last - first) // self.settings.block
        residues = {head: shard.residue for shard in self.shards for head in shard.heads}
        residue_H1 = torch.tensor([residues[head] for head in sorted(residues)])[:, None]
        near_n = block_n[-1] - block_n < self.settings.local
        return near_n | (block_n % self.settings.stride == residue_H1)

    def _far(self, documents: Documents, groups: int) -> Far:
        """Plans the far part of a micro-batch."""
        settings, keys, reaches, sizes = self.settings, [], [], []
        for shard in self.shards:
            key_F, reach = _far_keys(documents, settings, shard.residue)
            keys.append((key_F[:, None] * groups + torch.tensor(shard.groups)).flatten())
            sizes.append(len(keys[-1]))
            reaches.append(reach)
        order_H = torch.tensor([head for shard in self.shards for head in shard.heads])
        return Far(
            Mirror(torch.cat(keys)),
            tuple(sizes),
            tuple(reaches),
            Mirror(order_H),
            Mirror(order_H.argsort()),
        )


@dataclass(frozen=True)
class Shard:
    """Heads of this rank that see the same far blocks.

    Attributes:
        residue: See `residue`.
        heads: Query heads, ascending.
        groups: Key-value heads of the query heads, each for equally many of them in turn.
    """

    residue: int
    heads: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Far:
    """The far blocks of a micro-batch, for all shards.

    Attributes:
        keys: Which rows of [S * G, D] each shard gathers, [N].
        sizes: So many of them are of each shard.
        reaches: Which of a shard's keys each query sees.
        order: The query heads, shard after shard, [H].
        back: Where each head is in that order, [H].
    """

    keys: Mirror
    sizes: tuple[int, ...]
    reaches: tuple[Reach, ...]
    order: Mirror
    back: Mirror


def _shards(settings: ShardedHeadsSettings, site: Site) -> tuple[Shard, ...]:
    """The shards that this rank has heads of, by residue."""
    by_query = settings.shard_by == "query_head"
    heads = site.all_heads if by_query else site.all_groups
    of_residue: dict[int, list[int]] = {}
    for head in range(site.heads):
        number = site.first_head + head
        number = number if by_query else number // site.share
        of_residue.setdefault(residue(number, heads, settings.stride), []).append(head)
    shards = []
    for at, members in sorted(of_residue.items()):
        served = [head // site.share for head in members]
        distinct = sorted(set(served))
        # Attention wants as many query heads for each key-value head: otherwise each has a copy.
        even = len({served.count(group) for group in distinct}) == 1
        shards.append(Shard(at, tuple(members), tuple(distinct if even else served)))
    return tuple(shards)


def _near(documents: Documents, block: int, local: int) -> Reach:
    """The last `local` blocks of each query's document, up to the query."""
    start_T, row_T = documents.starts(), documents.rows()
    block_T = ((row_T - start_T) // block - (local - 1)).clamp(min=0)
    return Reach(start_T + block_T * block, row_T + 1)


def _far_keys(
    documents: Documents, settings: ShardedHeadsSettings, at: int
) -> tuple[Tensor, Reach]:
    """The keys of the far blocks b with b % stride == at, int64 [F], and who sees which of them.

    A far block lies before another one of its document, so that it is complete.
    """
    block, local, stride = settings.block, settings.local, settings.stride
    cu = torch.tensor(documents.cu_seqlens)

    def count(last_block: Tensor) -> Tensor:
        return ((last_block - local - at) // stride + 1).clamp(min=0)

    blocks_D = count((cu.diff() + block - 1) // block - 1)
    before_D = blocks_D.cumsum(0) - blocks_D
    document = torch.repeat_interleave(torch.arange(len(blocks_D)), blocks_D)
    number = torch.arange(len(document)) - before_D[document]
    first_key = cu[document] + (at + number * stride) * block
    key_F = (first_key[:, None] + torch.arange(block)).flatten()
    start_T, row_T = documents.starts(), documents.rows()
    document_T = torch.searchsorted(cu, row_T, right=True) - 1
    first_T = before_D[document_T] * block
    return key_F, Reach(first_T, first_T + count((row_T - start_T) // block) * block)
