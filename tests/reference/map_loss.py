"""The specification of attention maps and of the divergence from them. Read by tests only.

Shapes: T query rows, S keys, B blocks, H query heads, K key-value heads, C maps.
"""

from itertools import pairwise

import torch
from torch import Tensor


def naive_map(
    q_THD: Tensor,
    k_SKD: Tensor,
    lse_TH: Tensor,
    visible_CTS: Tensor,
    starts_B1: Tensor,
    scale: float,
    softcap: float | None = None,
    key_bias_SH: Tensor | None = None,
    folds: tuple[str, str] = ("sum", "sum"),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """exp(score - lse), folded over the heads of a map, then over blocks: [C, T, B]."""
    k_SHD = k_SKD.to(dtype).repeat_interleave(q_THD.shape[1] // k_SKD.shape[1], dim=1)
    scores_HTS = torch.einsum("thd,shd->hts", q_THD.to(dtype), k_SHD) * scale
    if softcap is not None:
        scores_HTS = softcap * torch.tanh(scores_HTS / softcap)
    if key_bias_SH is not None:
        scores_HTS = scores_HTS + key_bias_SH.to(dtype).T[:, None]
    weights_HTS = (scores_HTS - lse_TH.to(dtype).T[..., None]).exp()
    weights_CRTS = weights_HTS.unflatten(0, (len(visible_CTS), -1))
    fold = {"sum": lambda x, dim: x.sum(dim), "max": lambda x, dim: x.amax(dim)}
    mass_CTS = fold[folds[0]](weights_CRTS, 1).masked_fill(~visible_CTS, 0.0)
    blocks = [
        fold[folds[1]](mass_CTS[..., start:stop], -1) if start < stop else 0 * mass_CTS.sum(-1)
        for start, stop in pairwise(starts_B1.tolist())
    ]
    return torch.stack(blocks, dim=-1) if blocks else mass_CTS[..., :0]


def naive_divergence(
    mass_CTB: Tensor, scores_CTB: Tensor, seen_CTB: Tensor, weight_T: Tensor
) -> tuple[Tensor, float]:
    """Weighted KL(mass / its sum || softmax(scores)) over the seen blocks, and the weights."""
    total, counted = scores_CTB.new_zeros(()), 0.0
    for mass_TB, scores_TB, seen_TB in zip(mass_CTB, scores_CTB, seen_CTB, strict=True):
        for mass_B, scores_B, seen_B, weight in zip(
            mass_TB, scores_TB, seen_TB, weight_T, strict=True
        ):
            if int(seen_B.sum()) < 2:
                continue
            target = mass_B[seen_B] / mass_B[seen_B].sum()
            log_predicted = scores_B[seen_B].log_softmax(-1)
            divergence = (torch.special.xlogy(target, target) - target * log_predicted).sum()
            total = total + weight.to(total.dtype) * divergence
            counted += float(weight)
    return total, counted
