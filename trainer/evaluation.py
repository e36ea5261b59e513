"""Loss on held-out documents, and the proof that a model reads its whole context.

Shapes: T tokens of this context rank, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .data.samples import Sample
from .engine.engine import Engine

_BUCKETS = 8


def held_out_loss(engine: Engine, samples: Sequence[Sample]) -> float:
    """Mean loss per token over the samples, the same number on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for sample, _number in _share(engine, samples):
        losses_T = engine.losses(sample)
        if sample is not None and losses_T is not None and engine.reporting and _number >= 0:
            weights_T = _local(engine, sample, sample.weights_T)
            sums += torch.stack([(losses_T * weights_T).double().sum(), weights_T.double().sum()])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def context_proof(engine: Engine, samples: Sequence[Sample], visible: int) -> dict[str, Any]:
    """What the tokens before the last `visible` ones are worth to the model.

    Every sample is the start of one long document. Its tokens beyond `visible` are predicted twice:
    with all that comes before them, and with only the last `visible` tokens in sight. The gain is
    the mean over documents of the difference in loss, with its standard error over documents.

    Returns:
        `buckets`: mean loss by position with full context; `gain`: `full`, `visible_only`, `gain`,
        `standard_error`, `documents`, `visible`.
    """
    length = int(samples[0].cu_seqlens[-1])
    edges = _edges(length)
    # Per bucket: loss, tokens. Per document: loss with full and with limited sight, tokens.
    buckets = torch.zeros(len(edges) - 1, 2, dtype=torch.float64, device=engine.device)
    documents_N3 = torch.zeros(len(samples), 3, dtype=torch.float64, device=engine.device)
    starts = torch.tensor(edges[1:-1], device=engine.device)
    for sample, number in _share(engine, samples):
        full_T = engine.losses(sample)
        limited_T = engine.losses(sample, window=visible)
        if full_T is None or limited_T is None or not engine.reporting or number < 0:
            continue
        weights_T = _local(engine, sample, sample.weights_T).double()
        index_T = engine.builder(length).index_T.to(engine.device)
        bucket_T = torch.bucketize(index_T, starts, right=True)
        pair_T2 = torch.stack([full_T * weights_T, weights_T], dim=1).double()
        buckets.index_add_(0, bucket_T, pair_T2)
        beyond_T = weights_T * (index_T >= visible)
        parts = (full_T * beyond_T, limited_T * beyond_T, beyond_T)
        documents_N3[number] += torch.stack([part.double().sum() for part in parts])
    dist.all_reduce(buckets)
    dist.all_reduce(documents_N3)
    return {
        "buckets": [
            {"first": first, "last": last, "loss": float(loss / tokens), "tokens": int(tokens)}
            for first, last, (loss, tokens) in zip(
                edges[:-1], edges[1:], buckets.tolist(), strict=True
            )
        ],
        "gain": _gain(documents_N3.cpu(), visible),
    }


def _gain(documents_N3: torch.Tensor, visible: int) -> dict[str, float | int]:
    full_N = documents_N3[:, 0] / documents_N3[:, 2]
    limited_N = documents_N3[:, 1] / documents_N3[:, 2]
    gain_N = limited_N - full_N
    count = gain_N.numel()
    # One document has no spread; 0 says that there is no standard error.
    error = float(gain_N.std()) / math.sqrt(count) if count > 1 else 0.0
    return {
        "full": float(full_N.mean()),
        "visible_only": float(limited_N.mean()),
        "gain": float(gain_N.mean()),
        "standard_error": error,
        "documents": count,
        "visible": visible,
    }


def _edges(length: int) -> list[int]:
    """Bucket bounds that double towards the end: 0, ..., length/4, length/2, length."""
    edges = {0, length}
    bound = length // 2
    while bound >= 16 and len(edges) < _BUCKETS:
        edges.add(bound)
        bound //= 2
    return sorted(edges)


def _share(engine: Engine, samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """This data rank's samples with their numbers.

    All ranks get equally many, as experts are exchanged between data ranks; the extra ones repeat
    the first sample under the number -1 and are not counted.
    """
    ranks = engine.groups.dp.size()
    rounds = -(-len(samples) // ranks)
    numbers = [turn * ranks + engine.data_rank for turn in range(rounds)]
    return [(samples[n], n) if n < len(samples) else (samples[0], -1) for n in numbers]


def _local(engine: Engine, sample: Sample, values_T: torch.Tensor) -> torch.Tensor:
    """The part of a sample's values that belongs to this context rank."""
    return values_T[engine.builder(len(values_T)).index_T].to(engine.device)
