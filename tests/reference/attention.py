"""The specification of `attend` in float64: one explicit mask, one softmax. Read by tests only.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

import torch
from torch import Tensor


def naive_attend(
    q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, first_T: Tensor, last_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H] in float64; rows that see nothing give 0 and -inf."""
    repeat = q_THD.shape[1] // k_SGD.shape[1]
    q, k, v = q_THD.double(), k_SGD.double(), v_SGV.double()
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    key_S = torch.arange(k.shape[0])
    visible_TS = (key_S >= first_T[:, None]) & (key_S < last_T[:, None])
    scores_HTS = torch.einsum("thd,shd->hts", q, k) * scale
    scores_HTS = scores_HTS.masked_fill(~visible_TS, float("-inf"))
    seen_T = visible_TS.any(dim=1)
    # Rows that see nothing go through a uniform softmax first, so that no gradient is NaN.
    safe_HTS = scores_HTS.masked_fill(~seen_T[:, None], 0.0)
    weights_HTS = safe_HTS.softmax(-1) * visible_TS
    lse_HT = safe_HTS.logsumexp(-1).masked_fill(~seen_T, float("-inf"))
    return torch.einsum("hts,shv->thv", weights_HTS, v), lse_HT.T


def naive_gradients(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    first_T: Tensor,
    last_T: Tensor,
    scale: float,
    dlse_TH: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv in float64 by automatic differentiation."""
    leaves = [x.detach().double().requires_grad_() for x in (q_THD, k_SGD, v_SGV)]
    out_THV, lse_TH = naive_attend(*leaves, first_T, last_T, scale)
    loss = (out_THV * dout_THV.double()).sum()
    if dlse_TH is not None:
        seen_TH = (first_T < last_T)[:, None].expand_as(lse_TH)
        loss = loss + (lse_TH[seen_TH] * dlse_TH.double()[seen_TH]).sum()
    return torch.autograd.grad(loss, leaves)
