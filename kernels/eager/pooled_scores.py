"""Scores of pooled keys by a chunk of query rows, with PyTorch's own operators.

On a CPU a chunk's scores stay in cache from the product to the sum over heads, so that one pass
does: the normaliser comes from scores that are there anyway.

Shapes: T rows of the chunk, P pooled keys, W of them in sight, H query heads, G key-value heads,
R = H / G, C heads that choose (G, or H), N = R * T, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import wide
from ..reach import Reach
from ..selection_plan import Sight, sight
from ..selection_rule import SelectionRule
from ..workspace import Workspace

# Scores of a chunk, over all heads. On a CPU they should stay in its cache, elsewhere a launch
# costs more than a cache miss.
MAX_SCORES_CPU = 2**21
MAX_SCORES = 2**26


class Scorer:
    """Scores of one selection, chunk by chunk.

    Attributes:
        heads: Heads of which scores exist at once.
        most: Scores that a chunk may have over these heads.
        rows: Rows that a chunk may have.
    """

    rows = 2**10

    def __init__(
        self,
        q_THD: Tensor,
        k_PGD: Tensor,
        seen: Reach,
        rule: SelectionRule,
        scale: float,
        lse_TH: Tensor | None,
        coarse: tuple[Tensor, Reach] | None,
    ) -> None:
        self.most = MAX_SCORES_CPU if q_THD.device.type == "cpu" else MAX_SCORES
        self.heads = q_THD.shape[1]
        self._q_THD, self._seen, self._rule, self._scale = q_THD, seen, rule, scale
        self._lse_TH = lse_TH
        self._k_GPD = _heads_first(k_PGD)
        self._coarse = None if coarse is None else (_heads_first(coarse[0]), coarse[1])
        self._space = Workspace(self._k_GPD.dtype, q_THD.device)

    def __call__(self, rows: slice, near: Sight) -> Tensor:
        """What the rows think of the windows in sight, [C, T, W], until the next call.

        Rows do not see all of these: of what they do not see the score is 0, or -inf for a
        logit of which the largest over heads counts.
        """
        rule, groups = self._rule, len(self._k_GPD)
        heads, height, width = self._q_THD.shape[1], rows.stop - rows.start, len(near)
        share = heads // groups
        choices = heads if rule.heads == "none" else groups
        scores_CTW = self._space.take("combined", choices, height, width)
        if not width:
            return scores_CTW
        logit_sum = rule.statistic == "logit" and rule.heads == "sum"
        for at in range(groups):
            q_TRD = self._q_THD[rows, at * share : (at + 1) * share].to(scores_CTW.dtype)
            if logit_sum:
                # The sum of products is the product of the sum.
                q_TRD = q_TRD.sum(1, keepdim=True)
            q_ND = q_TRD.transpose(0, 1).mul(self._scale).flatten(0, 1)
            products = self._space.take("products", len(q_ND), width)
            torch.mm(q_ND, self._k_GPD[at, near.windows].T, out=products)
            statistic = self._statistic(products, q_ND, at, rows, near)
            statistic_RTW = statistic.view(-1, height, width)
            if rule.heads == "none":
                scores_CTW[at * share : (at + 1) * share] = statistic_RTW
            elif rule.heads == "sum":
                torch.sum(statistic_RTW, 0, out=scores_CTW[at])
            else:
                torch.amax(statistic_RTW, 0, out=scores_CTW[at])
        return scores_CTW

    def _statistic(
        self, products_NW: Tensor, q_ND: Tensor, at: int, rows: slice, near: Sight
    ) -> Tensor:
        """Probabilities or logits of the products, [N, W]; it may be where the products were."""
        rule, device = self._rule, products_NW.device
        if rule.statistic == "logit":
            fill = float("-inf") if rule.heads == "max" else 0.0
            return _hide(products_NW, self._seen, rows, near, fill)
        _hide(products_NW, self._seen, rows, near, float("-inf"))
        if self._lse_TH is None and self._coarse is None:
            share_NW = self._space.take("shares", *products_NW.shape)
            torch.softmax(products_NW, -1, out=share_NW)
            if near.blind:
                blind_T = self._seen.first.on(device)[rows] >= self._seen.last.on(device)[rows]
                height = rows.stop - rows.start
                share_NW.view(-1, height, len(near)).masked_fill_(blind_T[:, None], 0.0)
            return share_NW
        if self._lse_TH is None:
            lse_N1 = self._coarse_lse(products_NW, q_ND, at, rows)
        else:
            share = self._lse_TH.shape[1] // len(self._k_GPD)
            lse_TR = self._lse_TH[rows, at * share : (at + 1) * share].to(products_NW.dtype)
            lse_N1 = lse_TR.T.reshape(-1, 1)
        # exp(-inf - 0) is the 0 that -inf minus -inf should be.
        lse_N1 = lse_N1.masked_fill(lse_N1 == float("-inf"), 0.0)
        return products_NW.sub_(lse_N1).exp_()

    def _coarse_lse(self, products_NW: Tensor, q_ND: Tensor, at: int, rows: slice) -> Tensor:
        """The lse over the coarser pooled keys, or the exact one of rows that see none."""
        assert self._coarse is not None
        k_GPD, seen = self._coarse
        far = sight(seen, rows)
        coarse_NW = self._space.take("coarse", len(q_ND), len(far))
        torch.mm(q_ND, k_GPD[at, far.windows].T, out=coarse_NW)
        lse_N1 = _hide(coarse_NW, seen, rows, far, float("-inf")).logsumexp(-1, keepdim=True)
        if not far.blind:
            return lse_N1
        exact_N1 = products_NW.logsumexp(-1, keepdim=True)
        return torch.where(lse_N1 == float("-inf"), exact_N1, lse_N1)


def _heads_first(k_PGD: Tensor) -> Tensor:
    return wide(k_PGD.transpose(0, 1)).contiguous()


def _hide(scores_NW: Tensor, seen: Reach, rows: slice, near: Sight, fill: float) -> Tensor:
    """Fills, in place, the scores of windows that a row does not see: those at the edges."""
    height, device = rows.stop - rows.start, scores_NW.device
    scores_RTW = scores_NW.view(len(scores_NW) // height, height, len(near))
    start, stop = near.windows.start, near.windows.stop
    if near.first > start:
        window_E = torch.arange(start, near.first, device=device)
        hidden_TE = window_E < seen.first.on(device)[rows, None]
        scores_RTW[..., : near.first - start].masked_fill_(hidden_TE, fill)
    if near.last < stop:
        window_E = torch.arange(near.last, stop, device=device)
        hidden_TE = window_E >= seen.last.on(device)[rows, None]
        scores_RTW[..., near.last - start :].masked_fill_(hidden_TE, fill)
    return scores_NW
