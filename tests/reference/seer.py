"""The specification of SeerAttention's two gates in float64, query by query. Read by tests only.

Shapes: T tokens, Q queries of the gate, C its heads, B blocks, G key-value heads, I gate dim.
"""

import math

import torch

from .map_loss import naive_divergence, naive_map
from .pooling import naive_pool, windows_of


def plan(cu, settings):
    """Blocks; their places; queries: own block, scored blocks, place, whether they teach."""
    size, token = settings.block, settings.form == "token"
    sizes, rows, place_B = torch.tensor(cu).diff().tolist(), [], []
    for tokens in sizes:
        first, late = len(place_B), tokens - math.ceil(tokens * settings.rows)
        place_B += range(0, tokens, size)
        for place in range(0, tokens, 1 if token else size):
            own = first + place // size
            rows.append((own, [*range(first, own + (not token))], place, place >= late))
    return windows_of(sizes, size, size, True), torch.tensor(place_B), rows


def naive_logits(q_THD, k_TGD, query, key, settings, cu, turn):
    """Logits [C, Q, B]; `turn(x, positions)` puts positions in."""
    blocks, place_B, rows = plan(cu, settings)
    q_QCX, share = q_THD.unflatten(1, (len(key), -1)).flatten(2), len(query) // len(key)
    q_QCX = naive_pool(q_THD, blocks, "mean") if settings.form == "block" else q_QCX
    k_BGX = torch.cat([naive_pool(k_TGD, blocks, how) for how in ("max", "min", "mean")], -1)
    q_QCI = torch.stack([q_QCX[:, c] @ query[c].T for c in range(len(query))], 1)
    k_BCI = torch.stack([k_BGX[:, c // share] @ key[c // share].T for c in range(len(query))], 1)
    q_QCI = turn(q_QCI, torch.tensor([row[2] for row in rows]))
    return torch.einsum("qci,bci->cqb", q_QCI, turn(k_BCI, place_B)) * settings.dim**-0.5


def naive_gate_loss(q, k, lse, logits, visible_TT, settings, cu, weight_T, scale):
    """Loss and weight, from turned queries and keys."""
    blocks, _, rows = plan(cu, settings)
    starts_B1 = torch.tensor([0, *(x[1] for x in blocks)])
    seen_CTT = visible_TT.expand(len(logits), -1, -1)
    mass = naive_map(q, k, lse, seen_CTT, starts_B1, scale, folds=("max", "max"))
    if settings.form == "block":
        mass = torch.stack([mass[:, start:stop].amax(1) for start, stop in blocks], 1)
        weight_T = torch.stack([weight_T[start:stop].sum() for start, stop in blocks])
    seen_QB = torch.tensor([[row[3] and b in row[1] for b in range(len(blocks))] for row in rows])
    return naive_divergence(mass, logits, seen_QB.expand_as(mass), weight_T)


def naive_gate_choice(logits_CQB, settings, cu):
    """The blocks that each query of the gate chooses, ascending."""
    chosen, least, rows = [], settings.threshold or 0.0, plan(cu, settings)[2]
    for (own, scored, _, _), x_CB in zip(rows, logits_CQB.unbind(1), strict=True):
        chosen.append([])
        for part in (dict(zip(scored, x_B[scored].softmax(0), strict=True)) for x_B in x_CB):
            best = sorted({*scored} - {own}, key=lambda b, p=part: -p[b])[: settings.count - 1]
            chosen[-1].append(sorted([own, *(b for b in best if part[b] >= least)]))
    return chosen
