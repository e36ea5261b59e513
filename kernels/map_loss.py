"""Map loss: KL divergence of what an indexer or a gate predicts from an attention map.

Loss and gradients come together, chunk by chunk of the queries, so that nothing is computed twice
and no map of the sequence exists.
Shapes: T query rows, S keys, B blocks, C maps (block heads), E key heads (1 or C), D any dim;
M rows of a chunk, U blocks, Z places for the keys of a block, L = U * Z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .attention_map import AttentionMap
from .blocks import Blocks
from .chunks import halves, plan_chunks
from .gate import Gate, GateGradients, add_gate_gradients, gate_logits
from .grid import Grid
from .indexer import MAX_ELEMENTS, Index, IndexGradients, add_index_gradients, index_scores
from .precision import wide
from .query_groups import QueryGroups
from .reach import Reach
from .slots import Slots, unit_range


class MapLoss(NamedTuple):
    """A loss and what it was summed over; fp32, fp64 for fp64 targets.

    Attributes:
        total: Weighted sum of the divergences, over rows and maps, in nats.
        weight: Sum of the weights of those that count, over rows and maps: a row that sees fewer
            than 2 keys or blocks has nothing to learn, and is in neither sum. total / weight is a
            mean; distributed callers add up either or both.
        rows_TC: The divergences, unweighted; 0 where they do not count.
    """

    total: Tensor
    weight: Tensor
    rows_TC: Tensor


@torch.no_grad()
def index_loss(
    target: AttentionMap,
    index: Index,
    reach: Reach,
    over: Grid | Blocks,
    weight_T: Tensor,
    *,
    elements: int = MAX_ELEMENTS,
) -> tuple[MapLoss, IndexGradients]:
    """KL(target || softmax of the index scores), and its gradients (DSA, arXiv 2512.02556).

    Both are distributions over what each query sees: over a grid's keys or blocks (warm-up, with
    the lse of dense attention), or over those that were chosen (sparse stage; both are
    renormalised there, whatever the lse was taken over). The score of a block is the largest of
    its visible keys' (MSA, arXiv 2606.13392). The target has no gradient.

    Needs about 64 bytes per element beside inputs and gradients, as long as what one row (or group
    of rows) sees has no more elements than that.

    Args:
        target: The attention's map, as many maps as the index has block heads.
        index: What predicts it.
        reach: The keys that each query sees.
        over: A grid, of single keys for DSA; or what each query chose.
        weight_T: Of the queries: 0 for padding.
        elements: Of a temporary.

    Returns:
        The loss and the gradients of its total.

    Raises:
        ValueError: Shapes or counts that contradict each other.
    """
    return _loss(target, _Indexed(index, elements), reach, over, weight_T, elements)


@torch.no_grad()
def gate_loss(
    target: AttentionMap,
    gate: Gate,
    reach: Reach,
    over: Grid | Blocks,
    weight_T: Tensor,
    *,
    groups: QueryGroups | None = None,
    elements: int = MAX_ELEMENTS,
) -> tuple[MapLoss, GateGradients]:
    """KL(target || softmax of the gate's logits), and its gradients (SeerAttention).

    See `index_loss`. SeerAttention-R's target takes the largest weight over the heads and over the
    keys of a block; SeerAttention's (arXiv 2410.13276) that over the queries and keys of a pair of
    blocks, for each head.

    Args:
        target: The attention's map, as many maps as the gate has heads.
        gate: What predicts it, with a key for each block of the grid.
        reach: The keys that each query sees.
        over: The grid, or the blocks that each query chose.
        weight_T: Of the queries: 0 for padding.
        groups: Queries for which the gate has one query, and the loss one row and one weight, with
            the largest weight over them as the target. Only over a grid. None for one each.
        elements: Of a temporary.

    Returns:
        The loss and the gradients of its total.

    Raises:
        ValueError: Shapes or counts that contradict each other.
    """
    if groups is not None and isinstance(over, Blocks):
        raise ValueError("groups of queries are compared over a grid, not over choices")
    grid = over.grid if isinstance(over, Blocks) else over
    if len(gate.k_BED) != len(grid):
        raise ValueError(f"{len(gate.k_BED)} gate keys for a grid of {len(grid)} blocks")
    return _loss(target, _Gated(gate), reach, over, weight_T, elements, groups)


class _Predictor(Protocol):
    """What predicts a map: scores of a chunk, and their way back."""

    queries: Tensor
    keys: Tensor
    gradients: Any

    def scores(self, slots: Slots) -> tuple[Tensor, Tensor | None]:
        """Scores [C, M, U], any where unseen, and something to keep for `add`."""
        ...

    def add(self, slots: Slots, dscores_CMU: Tensor, kept: Tensor | None) -> None:
        """Takes the gradient of the scores, 0 where unseen, into `gradients`."""
        ...


@dataclass
class _Indexed:
    index: Index
    elements: int

    def __post_init__(self) -> None:
        self.gradients = IndexGradients.zeros(self.index)
        self.queries, self.keys = self.index.q_TCJD, self.index.k_SED

    def scores(self, slots: Slots) -> tuple[Tensor, Tensor | None]:
        scores_CML = index_scores(self.index, slots, self.elements)
        _, blocks, size = slots.shape
        if size == 1:
            return scores_CML, None
        scores_CML.masked_fill_(~slots.seen_CMUZ.flatten(2), float("-inf"))
        return scores_CML.unflatten(2, (blocks, size)).max(-1)

    def add(self, slots: Slots, dscores_CMU: Tensor, kept: Tensor | None) -> None:
        if kept is not None:
            places = dscores_CMU.new_zeros(*dscores_CMU.shape, slots.shape[2])
            dscores_CMU = places.scatter_(3, kept.unsqueeze(3), dscores_CMU.unsqueeze(3)).flatten(2)
        add_index_gradients(self.gradients, self.index, slots, dscores_CMU, self.elements)


@dataclass
class _Gated:
    gate: Gate

    def __post_init__(self) -> None:
        self.gradients = GateGradients.zeros(self.gate)
        self.queries, self.keys = self.gate.q_TCD, self.gate.k_BED

    def scores(self, slots: Slots) -> tuple[Tensor, Tensor | None]:
        return gate_logits(self.gate, slots), None

    def add(self, slots: Slots, dscores_CMU: Tensor, kept: Tensor | None) -> None:
        del kept
        add_gate_gradients(self.gradients, self.gate, slots, dscores_CMU)


def _loss(
    target: AttentionMap,
    predictor: _Predictor,
    reach: Reach,
    over: Grid | Blocks,
    weight_T: Tensor,
    elements: int,
    groups: QueryGroups | None = None,
) -> tuple[MapLoss, Any]:
    _check(target, predictor, reach, over, weight_T, groups)
    like = wide(target.q_THD[:0])
    rows_TC = like.new_zeros(len(weight_T), target.maps)
    counts_TC = like.new_zeros(len(weight_T), target.maps)
    for slots, some in _all_slots(target, predictor, reach, over, elements, groups):
        mass_CMU = target.chunk(slots, elements)
        if groups is not None:
            mass_CMU = groups.largest_of(mass_CMU, some)
            slots = groups.together(slots, some)
        scores_CMU, kept = predictor.scores(slots)
        seen_CMU = slots.seen_CMUZ.any(-1)
        weight_M = weight_T[slots.rows].to(rows_TC.dtype)
        rows_CM, counts_CM, dscores_CMU = _divergence(mass_CMU, scores_CMU, seen_CMU, weight_M)
        rows_TC[slots.rows], counts_TC[slots.rows] = rows_CM.T, counts_CM.T
        predictor.add(slots, dscores_CMU, kept)
    weight_T1 = weight_T.to(rows_TC.dtype).unsqueeze(1)
    total, weight = (rows_TC * weight_T1).sum(), (counts_TC * weight_T1).sum()
    return MapLoss(total, weight, rows_TC), predictor.gradients


def _divergence(
    mass_CMU: Tensor, scores_CMU: Tensor, seen_CMU: Tensor, weight_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences [C, M], which of them count, and the weighted gradient of the scores.

    Overwrites both maps.
    """
    seen_CMU = seen_CMU.expand_as(mass_CMU)
    mass_CM1 = mass_CMU.sum(-1, keepdim=True)
    # Where no weight is left of the target (all of it underflowed), there is nothing to learn.
    counts_CM1 = (seen_CMU.sum(-1, keepdim=True) > 1) & (mass_CM1 > 0)
    target_CMU = mass_CMU.div_(mass_CM1.masked_fill_(~counts_CM1, 1.0))
    scores_CMU = scores_CMU.to(target_CMU.dtype).masked_fill_(~seen_CMU, float("-inf"))
    lse_CM1 = scores_CMU.logsumexp(-1, keepdim=True)
    log_CMU = scores_CMU.sub_(lse_CM1.masked_fill_(lse_CM1 == float("-inf"), 0.0))
    tiny = torch.finfo(target_CMU.dtype).tiny
    excess_CMU = target_CMU.clamp(min=tiny).log_().sub_(log_CMU).masked_fill_(~seen_CMU, 0.0)
    rows_CM1 = excess_CMU.mul_(target_CMU).sum(-1, keepdim=True).mul_(counts_CM1)
    dscores_CMU = log_CMU.exp_().sub_(target_CMU).mul_(counts_CM1 * weight_M[:, None])
    return rows_CM1[..., 0], counts_CM1[..., 0], dscores_CMU


def _all_slots(
    target: AttentionMap,
    predictor: _Predictor,
    reach: Reach,
    over: Grid | Blocks,
    elements: int,
    groups: QueryGroups | None,
) -> Iterator[tuple[Slots, slice]]:
    """Every row that sees something, in chunks whose temporaries fit; and the chunk's groups."""
    grid = over.grid if isinstance(over, Blocks) else over
    if reach.empty or not grid.largest:
        return
    if isinstance(over, Blocks):
        widest = max(target.q_THD.shape[2], predictor.queries.shape[-1])
        places = over.ids_QCN.shape[2] * grid.largest * target.maps
        step = max(1, elements // max(1, places * widest))
        for start in range(0, len(reach), step):
            rows = slice(start, min(start + step, len(reach)))
            yield Slots.chosen(rows, over, reach), rows
        return
    whole, pairs = reach, elements // target.maps
    if groups is not None:
        whole, pairs = groups.reach(reach), pairs // max(1, groups.largest)
    waiting = plan_chunks(whole, max(1, pairs))[::-1]
    while waiting:
        chunk = waiting.pop()
        first, last = unit_range(chunk, grid)
        bounds, rows = grid.starts_B1, chunk.stop - chunk.start
        if first >= last or int(bounds[first]) >= int(bounds[last]):
            continue
        # Every block has as many places as the largest of the chunk, which are not all keys.
        if rows > 1 and rows * (last - first) * grid.largest_of(first, last) > 2 * max(1, pairs):
            waiting += halves(whole, chunk)[::-1]
            continue
        chunk_rows = chunk if groups is None else groups.rows_of(chunk)
        yield Slots.shared(chunk_rows, slice(first, last), grid, reach, target.q_THD), chunk.rows


def _check(
    target: AttentionMap,
    predictor: _Predictor,
    reach: Reach,
    over: Grid | Blocks,
    weight_T: Tensor,
    groups: QueryGroups | None,
) -> None:
    rows, keys, maps = len(reach), len(target.k_SKD), target.maps
    asked, most = (rows, rows) if groups is None else (len(groups), groups.rows)
    lengths = {len(target.q_THD), rows, most}, {len(predictor.queries), asked, len(weight_T)}
    if any(len(several) > 1 for several in lengths) or weight_T.ndim != 1:
        raise ValueError(
            f"{len(target.q_THD)} queries, {len(predictor.queries)} that predict, a reach of "
            f"{rows} and weights {list(weight_T.shape)}: all must be one per row or group"
        )
    if predictor.queries.shape[1] != maps:
        raise ValueError(f"{predictor.queries.shape[1]} block heads cannot predict {maps} maps")
    grid = over.grid if isinstance(over, Blocks) else over
    if max(int(grid.starts_B1[-1]), reach.stop) > keys:
        raise ValueError(f"{keys} keys, but a grid of {int(grid.starts_B1[-1])} and a reach up to "
                         f"{reach.stop}")  # fmt: skip
    if isinstance(predictor, _Indexed) and len(predictor.keys) != keys:
        raise ValueError(f"{len(predictor.keys)} index keys for {keys} keys")
    if isinstance(over, Blocks):
        heads = over.ids_QCN.shape[1]
        if heads not in (1, maps) or over.rows != rows:
            raise ValueError(f"choices of {over.rows} rows and {heads} block heads, but {rows} "
                             f"rows and {maps} maps")  # fmt: skip
