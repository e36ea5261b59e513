"""The proof that a model reads its whole context.

A window over attention would be no test: every layer passes on what the one below it saw, so that
stacked layers see far beyond the window, and a model that rests its attention on the first tokens
suffers from losing them whatever the context is worth. So the context is cut instead: the text
before the last tokens is not there at all.

Shapes: T tokens of this context rank, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .data.samples import Sample, cut_contexts, cut_step
from .engine.engine import Engine
from .evaluation import local_part, shares

_BUCKETS = 8


def context_proof(engine: Engine, samples: Sequence[Sample], visible: int) -> dict[str, Any]:
    """What the tokens before the last `visible` ones are worth to the model.

    Every sample is the start of one long document. Its tokens beyond `visible` are predicted twice:
    from all that comes before them, and from a cut context of at least `visible` and at most
    `visible_most` tokens, so that the gain is never overstated. The gain is the mean over documents
    of the difference in loss, with its standard error over documents.

    Returns:
        `buckets`: mean loss by position with full context; `gain`: `full`, `visible_only`, `gain`,
        `standard_error`, `documents`, `visible`, `visible_most`.
    """
    length = int(samples[0].cu_seqlens[-1])
    edges = _edges(length)
    buckets_B2 = torch.zeros(len(edges) - 1, 2, dtype=torch.float64, device=engine.device)
    documents_N4 = torch.zeros(len(samples), 4, dtype=torch.float64, device=engine.device)
    starts = torch.tensor(edges[1:-1], device=engine.device)
    for sample, number in shares(engine, samples):
        pairs = [_losses_and_weights(engine, sample)]
        pairs += [_losses_and_weights(engine, cut) for cut in cut_contexts(sample, visible)]
        if not engine.reporting or number < 0:
            continue
        full_T2, index_T = pairs[0], engine.place(sample).index_T.to(engine.device)
        bucket_T = torch.bucketize(index_T, starts, right=True)
        buckets_B2.index_add_(0, bucket_T, full_T2)
        documents_N4[number, :2] += full_T2[index_T >= visible].sum(0)
        documents_N4[number, 2:] += torch.cat(pairs[1:]).sum(0)
    dist.all_reduce(buckets_B2)
    dist.all_reduce(documents_N4)
    return {
        "buckets": [
            {"first": first, "last": last, "loss": float(loss / tokens), "tokens": int(tokens)}
            for first, last, (loss, tokens) in zip(
                edges[:-1], edges[1:], buckets_B2.tolist(), strict=True
            )
        ],
        "gain": _gain(documents_N4.cpu())
        | {"visible": visible, "visible_most": visible + cut_step(length, visible) - 1},
    }


def _losses_and_weights(engine: Engine, sample: Sample) -> torch.Tensor:
    """Weighted losses and weights [T, 2], fp64; zeros where this rank has no losses."""
    losses_T = engine.losses(sample)
    weights_T = local_part(engine, sample, sample.weights_T).double()
    if losses_T is None:
        return torch.zeros(len(weights_T), 2, dtype=torch.float64, device=engine.device)
    return torch.stack([losses_T.double() * weights_T, weights_T], dim=1)


def _gain(documents_N4: torch.Tensor) -> dict[str, float | int]:
    """From each document's loss and tokens with full context, and with cut contexts."""
    full_N = documents_N4[:, 0] / documents_N4[:, 1]
    cut_N = documents_N4[:, 2] / documents_N4[:, 3]
    gain_N = cut_N - full_N
    count = gain_N.numel()
    # One document has no spread; 0 says that there is no standard error.
    error = float(gain_N.std()) / math.sqrt(count) if count > 1 else 0.0
    return {
        "full": float(full_N.mean()),
        "visible_only": float(cut_N.mean()),
        "gain": float(gain_N.mean()),
        "standard_error": error,
        "documents": count,
    }


def _edges(length: int) -> list[int]:
    """Bucket bounds that double towards the end: 0, ..., length/4, length/2, length."""
    edges = {0, length}
    bound = length // 2
    while bound >= 16 and len(edges) < _BUCKETS:
        edges.add(bound)
        bound //= 2
    return sorted(edges)
