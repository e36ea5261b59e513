"""The specification of NSA in float64 (arXiv 2502.11089), for one document. Read by tests only.

Shapes: L tokens, H query heads, G key-value heads, D their dim, E hidden, P windows.
"""

import torch

from .attention import naive_attend
from .compression import naive_compress


def naive_choice(p_P, own, given):
    """Blocks that a query of block `own` chooses by its group's probabilities: eq. 9 to 11."""
    p, cells = p_P.tolist(), given.block // given.compress_stride
    overlap, scores = given.compress_length // given.compress_stride, []
    for j in range(own + 1):
        terms = [cells * j + m - n for m in range(cells) for n in range(overlap)]
        forced = j < given.initial or j > own - given.local
        scores.append(float("inf") if forced else sum(p[i] for i in terms if 0 <= i < len(p)))
    return sorted(sorted(range(own + 1), key=lambda j: (-scores[j], j))[: given.count])


def naive_nsa(hidden, q, k, v, given, own, turn, how, sink_H=None):
    """Output [L, H, D], and the chosen blocks by (query, key-value head).

    `given` are the settings, `own` the parameters by name, `turn` is RoPE of tokens at positions,
    and `how` says scale and dtype.
    """
    at, groups, share = torch.arange(len(q)), k.shape[1], q.shape[1] // k.shape[1]
    qt, kt = turn(q, at), turn(k, at)
    far_k, far_v, near_k, near_v = k, v, k, v
    if given.branch_kv == "independent":
        kv = torch.einsum("le,gbcde->bclgd", hidden, own["branch_kv"])
        far_k, far_v, near_k, near_v = kv.flatten(0, 1)
    of_keys = {name[5:]: x for name, x in own.items() if name.startswith("keys.")}
    of_values = {name[7:]: x for name, x in own.items() if name.startswith("values.")}
    after = given.compress_after_rope
    far_k = naive_compress(turn(far_k, at) if after else far_k, given, of_keys)
    starts_P = torch.arange(len(far_k)) * given.compress_stride
    far_k = far_k if after else turn(far_k, starts_P)
    seen_LP = at[:, None] >= starts_P + given.compress_length - 1
    far_v = naive_compress(far_v, given, of_values)
    far, lse = naive_attend(qt, far_k, far_v, seen_LP[None], **how)
    products = torch.einsum("lhd,phd->lhp", qt, far_k.repeat_interleave(share, 1)) * how["scale"]
    p_LHP = (products - lse.nan_to_num(neginf=0.0)[..., None]).exp() * seen_LP[:, None]
    p_LGP, chosen = p_LHP.unflatten(1, (groups, share)).sum(2), {}
    picked = torch.zeros(groups, len(q), len(q), dtype=torch.bool)
    for t in range(len(q)):
        for g in range(groups):
            chosen[t, g] = naive_choice(p_LGP[t, g], t // given.block, given)
            picked[g, t] = torch.isin(at // given.block, torch.tensor(chosen[t, g]))
    causal = at[:, None] >= at
    picked = (picked & causal).repeat_interleave(share, 0)
    near = (causal & (at[:, None] - at < given.window))[None]
    chosen_out, _ = naive_attend(qt, kt, v, picked, sink_H=sink_H, **how)
    near_out, _ = naive_attend(qt, turn(near_k, at), near_v, near, sink_H=sink_H, **how)
    gates = torch.einsum("le,hbe->lhb", hidden, own["gate"].view(-1, 3, len(hidden.T))).sigmoid()
    branches = far, chosen_out, near_out
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches)), chosen
