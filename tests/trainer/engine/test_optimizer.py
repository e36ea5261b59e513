"""Clipping and the non-finite guard: on the device, and the same on every rank."""

import math

import pytest
import torch
from support.cases import batches, take_step
from support.tiny import VOCAB, tiny_run


def step_counts(engine):
    """AdamW's own step counts."""
    return [
        state["step"].item()
        for part in engine.optimizer._parts
        for state in part.optimizer.state.values()
    ]


def poisoned_step(run, value: float):
    """A good step, one with a poisoned gradient on rank 0 only, and the weights around it."""
    import torch.distributed as dist
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    take_step(engine, 0)
    before = [p.detach().clone() for p in engine.model.parameters()]
    steps = step_counts(engine)
    handle = None
    if dist.get_rank() == 0:
        weight = next(engine.model.parameters())
        handle = weight.register_hook(lambda grad: grad.fill_(value))
    sums = engine.train_step(batches(engine, 1), 1e-2, False, ("x",)).on_host()
    if handle is not None:
        handle.remove()
    same = all(torch.equal(a, p) for a, p in zip(before, engine.model.parameters(), strict=True))
    kept = steps == step_counts(engine)
    good = take_step(engine, 2)
    moved = not all(
        torch.equal(a, p) for a, p in zip(before, engine.model.parameters(), strict=True)
    )
    return sums["skipped"], same, kept, moved, math.isfinite(good[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}], ids=lambda p: str(p)
)
def test_a_non_finite_gradient_of_one_rank_is_applied_by_none(worlds, parallel, value):
    results = worlds(2).run(poisoned_step, tiny_run(stage__parallel=parallel), value)
    assert results == [(1.0, True, True, True, True)] * 2


def update_size(run):
    """Norm of the first update of plain AdamW without decay, whose first step is g/(|g|+eps)."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    before = [p.detach().clone() for p in engine.model.parameters()]
    _, norm = take_step(engine, 0, run.stages[0].optimizer.lr)
    after = engine.model.parameters()
    moved = sum((a - p).square().sum() for a, p in zip(before, after, strict=True)).sqrt()
    return norm, moved.item()


def test_clipping_divides_the_gradient_by_norm_over_clip(worlds):
    """With a huge eps Adam's step is proportional to the gradient, so clipping shows."""
    huge = {"eps": 1e4, "weight_decay": 0, "lr": 1e3}

    def run(clip):
        changes = {f"stage__optimizer__{name}": value for name, value in huge.items()}
        return tiny_run(**changes, stage__optimizer__clip=clip)

    norm, free = worlds(1).run(update_size, run(0))[0]
    clipped_norm, clipped = worlds(1).run(update_size, run(0.1))[0]
    assert clipped_norm == pytest.approx(norm), "the norm is reported before clipping"
    assert clipped / free == pytest.approx(0.1 / norm, rel=1e-3)


def bf16_losses(run):
    """Losses of a few steps in bf16."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    assert next(engine.model.parameters()).dtype == torch.bfloat16
    return [take_step(engine, 0) for _ in range(8)]


@pytest.mark.parametrize(
    "ranks, parallel", [(1, {}), (2, {"tensor": 2, "sequence": True}), (2, {"context": 2})]
)
def test_bf16_trains(worlds, ranks, parallel):
    run = tiny_run(precision="bf16", stage__parallel=parallel)
    found = worlds(ranks).run(bf16_losses, run)[0]
    assert found[-1][0] < found[0][0] - 0.1, "the same batch is learned"
