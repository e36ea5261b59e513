"""The specification of an indexer's layer (DSA, MSA): one mask, explicit maps. Read by tests only.

Shapes: T tokens, H heads, C choosers, J index heads, I index dim, B blocks.
"""

import torch
from torch import Tensor

from .attention import naive_attend
from .indexer import naive_block_scores, naive_choice, naive_index_scores
from .map_loss import naive_divergence, naive_map
from .visibility import chosen


def naive_scores(hidden_TE, parameters, settings, turn, dtype=torch.float64) -> Tensor:
    """Index scores [C, T, T]; `turn(x, share)` puts positions in."""
    heads, dim, share = settings.heads, settings.dim, settings.rotary_share
    hidden, own = hidden_TE.to(dtype), {name: x.to(dtype) for name, x in parameters.items()}
    q_TXI = turn((hidden @ own["query"].T).unflatten(1, (-1, dim)), share)
    k_TI = hidden @ own["key"].T
    k_TI = k_TI - k_TI.mean(1, keepdim=True)
    k_TI = k_TI / (k_TI.square().mean(1, keepdim=True) + 1e-6).sqrt()
    k_T1I = turn((k_TI * own["key_norm"] + own["key_bias"]).unsqueeze(1), share)
    weight = (hidden @ own["weight"].T).unflatten(1, (-1, heads)) if "weight" in own else None
    scale = (heads * dim) ** -0.5
    q_TCJI = q_TXI.unflatten(1, (-1, heads))
    return naive_index_scores(q_TCJI, k_T1I, weight, scale, settings.relu, dtype)


def naive_ids(scores_CTT: Tensor, visible_TT: Tensor, starts_B1: Tensor, settings) -> Tensor:
    """The chosen blocks, ascending and then -1, int64 [T, C, N]."""
    scores_CTB = naive_block_scores(scores_CTT.detach(), visible_TT, starts_B1)
    for row in range(len(visible_TT)):
        met = (scores_CTB[0, row] > float("-inf")).nonzero()[:, 0].tolist()
        scores_CTB[:, row, met[len(met) - settings.local :]] = float("inf")
    choice = naive_choice(scores_CTB, settings.count)
    return pad(choice, settings.count)


def pad(choice: list[list[list[int]]], count: int) -> Tensor:
    """Lists as one tensor, filled up with -1."""
    return torch.tensor([[ids + [-1] * (count - len(ids)) for ids in row] for row in choice])


def naive_indexer(leaves, parameters, settings, visible_TT, starts_B1, ids, weight_T, turn, scale):
    """Output, the loss and its weight. `ids`: the choices, or None for dense attention."""
    hidden, q, k, v = leaves
    scores_CTT = naive_scores(hidden.detach(), parameters, settings, turn)
    heads, maps, tokens = q.shape[1], len(scores_CTT), len(q)
    seen_HTT = visible_TT.expand(heads, -1, -1)
    if ids is not None:
        seen_HTT = seen_HTT & chosen(ids, starts_B1, torch.arange(tokens), heads, tokens)
    q, k = turn(q, 1.0), turn(k, 1.0)
    out, lse = naive_attend(q, k, v, seen_HTT, scale)
    seen_CTT = seen_HTT[:: heads // maps]
    mass = naive_map(q.detach(), k.detach(), lse.detach(), seen_CTT, starts_B1, scale)
    scores_CTB = naive_block_scores(scores_CTT, seen_CTT, starts_B1)
    seen_CTB = scores_CTB > float("-inf")
    return out, *naive_divergence(mass, scores_CTB, seen_CTB, weight_T)
