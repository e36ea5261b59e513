"""The specification of SSA in float64: two explicit masks, one gate. Read by tests only.

Shapes: T tokens, H query heads, G key-value heads, D head dim.
"""

from itertools import pairwise

import torch
from reference.attention import naive_attend
from torch import Tensor


def naive_blocks(q_THD: Tensor, k_TGD: Tensor, cu, block: int, count: int, scale: float) -> Tensor:
    """Which keys lie in chosen blocks, causal and inside documents, [G, T, T]."""
    tokens, groups = len(q_THD), k_TGD.shape[1]
    share = q_THD.shape[1] // groups
    seen_GTT = torch.zeros(groups, tokens, tokens, dtype=torch.bool)
    for begin, end in pairwise(cu):
        whole = (end - begin) // block
        ends = [begin + block * (n + 1) for n in range(whole)]
        means = [k_TGD[stop - block : stop].detach().mean(0) for stop in ends]
        for t in range(begin, end):
            own = (t - begin) // block
            visible = [n for n in range(whole) if ends[n] <= t + 1]
            for g in range(groups):
                score = dict.fromkeys(range(own), 0.0)
                if visible:
                    queries = q_THD[t, g * share : (g + 1) * share].detach()
                    logits = torch.stack([queries @ means[n][g] for n in visible], -1) * scale
                    score |= dict(zip(visible, logits.softmax(-1).sum(0).tolist(), strict=True))
                score[own] = float("inf")
                for n in sorted(score, key=lambda n, s=score: (-s[n], n))[:count]:
                    seen_GTT[g, t, begin + n * block : min(begin + (n + 1) * block, t + 1)] = True
    return seen_GTT


def naive_streams(hidden, q, k, v, gate, cu, block, count, scale) -> tuple[Tensor, Tensor]:
    """The dense and the sparse output behind the gate, [T, H, D], of turned q and k."""
    tokens = len(q)
    document_T = torch.bucketize(torch.arange(tokens), torch.tensor(cu[1:]), right=True)
    causal_TT = (document_T[:, None] == document_T[None]).tril()
    blocks_GTT = naive_blocks(q, k, cu, block, count, scale)
    sparse_HTT = blocks_GTT.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    gate_TH1 = torch.sigmoid(hidden @ gate.T)[..., None]
    full, _ = naive_attend(q, k, v, causal_TT[None], scale)
    sparse, _ = naive_attend(q, k, v, sparse_HTT, scale)
    return full * gate_TH1, sparse * gate_TH1
