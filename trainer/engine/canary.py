"""Canary: some tokens computed over the context ranks, and by each of them alone, must agree.

Shapes: S tokens that are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from ...attention.notes import Notes
from ..data.samples import Sample
from .comparison import Comparison
from .engine import Engine
from .microbatch import BatchBuilder, MicroBatch
from .place import Places

SHORTEST = 2048
"""Tokens that mechanisms can choose among, and that fit on a rank in any case."""

LONGEST = 4096
"""Tokens per context rank beyond which more of them would only cost time."""


def canary_tokens(tokens: int, context: int) -> int:
    """How many of a micro-batch's first tokens are compared.

    One rank has to hold all of them, so there are no more than it has in a step, unless these are
    few.

    Args:
        tokens: Of the micro-batch.
        context: Context ranks.
    """
    return min(tokens, max(tokens // context, SHORTEST), LONGEST * context)


def compare(engine: Engine, sample: Sample) -> Comparison:
    """Forward and backward with the same weights, over the context ranks and without them.

    Over them it is what a training step does. Without, every context rank has all tokens, in a
    layout of one rank, with the same tensor and pipeline ranks; loss and gradients are normalised
    here, and not as training does it. Compared are the gradients that the optimizer would get.
    Nothing remains: no update, no gradient, no draw.

    Args:
        engine: A stage's, with an optimizer.
        sample: This data rank's micro-batch.

    Returns:
        The same on every rank, but for the seconds.
    """
    optimizer, parallel, begun = engine.optimizer, engine.stage.parallel, time.monotonic()
    assert optimizer is not None
    tokens = canary_tokens(len(sample.tokens_T), parallel.context)
    sample = _beginning(sample, tokens)
    together = _together(engine, sample)
    grads = [grad.clone() for grad in optimizer.gradients()]
    alone = _alone(engine, sample)
    squares = [_squares(*pair) for pair in zip(grads, optimizer.gradients(), strict=True)]
    _forget(engine)
    zero = torch.zeros(3, dtype=torch.float64, device=engine.device)
    found = torch.stack([*together.values(), *alone.values()]).flatten()
    sums = torch.cat([found, sum(squares, zero)])
    dist.all_reduce(sums)
    numbers, count = sums.tolist(), len(together)
    over, one, difference = (math.sqrt(square) for square in numbers[-3:])
    totals, weights = numbers[:-3:2], numbers[1:-3:2]
    means = [
        total / weight if weight else 0.0 for total, weight in zip(totals, weights, strict=True)
    ]
    return Comparison(
        exchange=engine.choice.kind,
        tokens=tokens,
        weights=(weights[0], weights[count] / parallel.context),
        losses={name: (means[at], means[at + count]) for at, name in enumerate(together)},
        grad_norm=(over, one),
        grad_difference=difference / one if one else over,
        seconds=time.monotonic() - begun,
    )


def _together(engine: Engine, sample: Sample) -> dict[str, torch.Tensor]:
    """The pass of a training step: finished gradients, and this rank's share of each loss."""
    _forget(engine)
    notes = Notes()
    batches = iter([engine.build(sample, notes)])
    reports = engine.accumulate(batches, 1, len(sample.tokens_T))
    return _shares(engine, reports, notes)


def _alone(engine: Engine, sample: Sample) -> dict[str, torch.Tensor]:
    """The same without context ranks, which here are so many data ranks of one sample."""
    _forget(engine)
    notes, config, frozen = Notes(), engine.config, engine.stage.trainable == "selection"
    batch = _on_one_rank(engine)(sample, notes)
    groups = copy(engine.groups)
    groups.cp = groups.expt_tp  # always of one rank
    finalize = partial(finalize_model_grads, num_tokens=None, pg_collection=groups)
    trained, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        with torch.set_grad_enabled(not frozen):
            reports = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iter([batch]),
                model=[engine.chunk],
                num_microbatches=1,
                seq_length=len(batch.tokens_R),
                micro_batch_size=1,
                forward_only=frozen,
                pg_collection=groups,
                p2p_communicator=P2PCommunicator(groups.pp, config),
            )
    finally:
        config.finalize_model_grads_func = trained
    finalize([engine.chunk])
    shares = _shares(engine, reports, notes)
    weights = shares["loss"][1].clone()
    dist.all_reduce(weights)
    # The sum counts every token once for each context rank, as the gradients do.
    engine.chunk.scale_gradients(1 / weights)
    return shares


def _on_one_rank(engine: Engine) -> BatchBuilder:
    """What makes micro-batches of which this rank has all tokens."""
    parallel, build = engine.stage.parallel, engine.build
    lone = parallel.model_copy(update={"context": 1})
    places = Places(lone, engine.choice, 0, None, pairs=float)
    return BatchBuilder(places, build.rope, build.device, build.seed)


def _forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Any, Any]:
    batch = next(batches)
    return chunk(batch), partial(_report, batch.attention.weights_T.sum())


def _report(
    weight: torch.Tensor, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Not training's own, so that a factor in there is seen; the sum stays as it is."""
    return output[0], weight.to(torch.int32), (output[0].detach(), weight)


def _shares(engine: Engine, reports: list[Any], notes: Notes) -> dict[str, torch.Tensor]:
    """This rank's share of the sum and the weight of each loss, fp64 [2]."""
    loss = torch.zeros(2, dtype=torch.float64, device=engine.device)
    if engine.reporting:
        loss = torch.stack([x.double() for x in reports[0][:2]])
    return {"loss": loss, **engine.shares(notes)}


def _squares(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Squared norms of two tensors and of their difference, fp64 [3]."""
    tensors = one, other, one - other
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]
    return torch.stack(norms).square()


def _forget(engine: Engine) -> None:
    assert engine.optimizer is not None
    engine.chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()


def _beginning(sample: Sample, tokens: int) -> Sample:
    """The first tokens of a sample, its last document cut."""
    bounds = sample.cu_seqlens[sample.cu_seqlens < tokens]
    return Sample(
        sample.tokens_T[:tokens],
        sample.labels_T[:tokens],
        sample.weights_T[:tokens],
        torch.cat([bounds, bounds.new_tensor([tokens])]),
        sample.number,
    )
