"""Loss on held-out documents.

Shapes: T tokens of this context rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..kernels.transfer import to_device
from .data.samples import Sample
from .engine.engine import Engine


def held_out_loss(engine: Engine, samples: Sequence[Sample]) -> float:
    """Mean loss per token over the samples, the same number on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for sample, _number in shares(engine, samples):
        losses_T = engine.losses(sample)
        if sample is not None and losses_T is not None and engine.reporting and _number >= 0:
            weights_T = local_part(engine, sample, sample.weights_T)
            sums += torch.stack([(losses_T * weights_T).double().sum(), weights_T.double().sum()])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def shares(engine: Engine, samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """This data rank's samples with their numbers.

    All ranks get equally many, as experts are exchanged between data ranks; the extra ones repeat
    the first sample under the number -1 and are not counted.
    """
    ranks = engine.groups.dp.size()
    rounds = -(-len(samples) // ranks)
    numbers = [turn * ranks + engine.data_rank for turn in range(rounds)]
    return [(samples[n], n) if n < len(samples) else (samples[0], -1) for n in numbers]


def local_part(engine: Engine, sample: Sample, values_T: torch.Tensor) -> torch.Tensor:
    """The part of a sample's values that belongs to this context rank."""
    return to_device(values_T[engine.place(sample).index_T], engine.device)
