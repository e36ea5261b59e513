"""The specification of `attend` in float64: one explicit mask, one softmax. Read by tests only.

Shapes: T query rows, S keys, H query heads, G key-value heads, D key dim, V value dim.
"""

import torch
from torch import Tensor


def naive_attend(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    visible_HTS: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    key_bias_SH: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] and lse [T, H]; rows that see nothing give 0 and -inf."""
    repeat = q_THD.shape[1] // k_SGD.shape[1]
    q, k, v = q_THD.to(dtype), k_SGD.to(dtype), v_SGV.to(dtype)
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores_HTS = torch.einsum("thd,shd->hts", q, k) * scale
    if softcap is not None:
        scores_HTS = softcap * torch.tanh(scores_HTS / softcap)
    if key_bias_SH is not None:
        scores_HTS = scores_HTS + key_bias_SH.to(dtype).T[:, None]
    visible_HTS = visible_HTS.expand_as(scores_HTS)
    if sink_H is not None:
        sink_HT1 = sink_H.to(dtype)[:, None, None].expand(-1, len(q), 1)
        scores_HTS = torch.cat([scores_HTS, sink_HT1], dim=-1)
        visible_HTS = torch.cat([visible_HTS, torch.ones_like(sink_HT1, dtype=torch.bool)], dim=-1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    visible_HTS = visible_HTS & (scores_HTS > float("-inf"))  # biases and sinks hide as well
    seen_HT1 = visible_HTS.any(dim=-1, keepdim=True)
    # Rows that see nothing go through a uniform softmax first, so that no gradient is NaN.
    safe_HTS = scores_HTS.masked_fill(~visible_HTS, float("-inf")).masked_fill(~seen_HT1, 0.0)
    weights_HTS = safe_HTS.softmax(-1) * visible_HTS
    lse_HT = safe_HTS.logsumexp(-1).masked_fill(~seen_HT1[..., 0], float("-inf"))
    return torch.einsum("hts,shv->thv", weights_HTS, v), lse_HT.T


def naive_gradients(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    visible_HTS: Tensor,
    scale: float,
    dlse_TH: Tensor | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
    **learned: Tensor,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, then those of `learned` (sink_H, key_bias_SH), by automatic differentiation."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q_THD, k_SGD, v_SGV)]
    more = {name: x.detach().to(dtype).requires_grad_() for name, x in learned.items()}
    with torch.enable_grad():
        out_THV, lse_TH = naive_attend(*leaves, visible_HTS, scale, softcap, **more, dtype=dtype)
        loss = (out_THV * dout_THV.to(dtype)).sum()
        if dlse_TH is not None:
            seen_TH = lse_TH.isfinite()
            loss = loss + (lse_TH[seen_TH] * dlse_TH.to(dtype)[seen_TH]).sum()
    return torch.autograd.grad(loss, [*leaves, *more.values()])
