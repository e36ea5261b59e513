"""The rules that one stage obeys: its layout divides the model, its experts and its batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..errors import Problem
from ..parallel.settings import ParallelSettings
from ..trainer.plan import model_ranks
from ..trainer.settings import ModelSettings, OptimizerSettings, StageSettings
from .check_attention import check_attention
from .check_exchange import check_exchange
from .check_rope import check_rope
from .fixes import around, divisors, either
from .recipe import Recipe


def check_stage(recipe: Recipe, stage: StageSettings, index: int, ranks: int) -> Iterator[Problem]:
    """What is wrong with a stage; paths start at `stages.N`.

    Args:
        recipe: What the stage belongs to.
        stage: The stage.
        index: Its place in the recipe.
        ranks: Processes of the run.
    """
    at = f"stages.{index}"
    yield from _check_tensor(recipe.model, stage.parallel, f"{at}.parallel")
    yield from check_exchange(recipe.model, stage.parallel, f"{at}.parallel")
    yield from _check_experts(recipe.model, stage, f"{at}.parallel", ranks)
    yield from check_rope(recipe.model, stage, f"{at}.rope")
    yield from check_attention(recipe.model, stage, at)
    yield from _check_optimizer(stage.optimizer, f"{at}.optimizer")
    yield from _check_length(stage, at)
    yield from _check_batch(stage, at, ranks)


def _check_tensor(model: ModelSettings, parallel: ParallelSettings, at: str) -> Iterator[Problem]:
    shared = {"model.heads": model.heads, "model.query_groups": model.kv_heads}
    if model.moe is None:
        shared["model.ffn_hidden"] = model.ffn_hidden
    if math.gcd(*shared.values()) % parallel.tensor:
        divided = ", ".join(f"{name} ({size})" for name, size in shared.items())
        works = divisors(math.gcd(*shared.values()))
        expected = f"a divisor of {divided}"
        yield Problem(f"{at}.tensor", str(parallel.tensor), expected, f"tensor: {either(works)}")
    if model.layers % parallel.pipeline:
        expected = f"a divisor of model.layers ({model.layers})"
        fix = f"pipeline: {either(divisors(model.layers))}"
        yield Problem(f"{at}.pipeline", str(parallel.pipeline), expected, fix)
    if parallel.sequence and parallel.tensor == 1:
        expected = "false: with tensor 1 there is nothing to split over"
        yield Problem(f"{at}.sequence", "true", expected, "set tensor, or remove sequence")
    if model.moe and parallel.tensor > 1 and not parallel.sequence:
        expected = "true: a MoE model with tensor > 1 needs sequence parallelism"
        yield Problem(f"{at}.sequence", "false", expected, "sequence: true")


def _check_experts(
    model: ModelSettings, stage: StageSettings, at: str, ranks: int
) -> Iterator[Problem]:
    expert = stage.parallel.expert
    if expert == 1:
        return
    if model.moe is None:
        expected = "1: the model has no experts"
        yield Problem(f"{at}.expert", str(expert), expected, "remove it, or set model.moe")
        return
    if model.moe.experts % expert:
        expected = f"a divisor of model.moe.experts ({model.moe.experts})"
        fix = f"expert: {either(divisors(model.moe.experts))}"
        yield Problem(f"{at}.expert", str(expert), expected, fix)
    replicas = ranks // model_ranks(stage) * stage.parallel.context
    if ranks % model_ranks(stage) == 0 and replicas % expert:
        expected = f"a divisor of the stage's data x context ranks ({replicas})"
        works = [n for n in divisors(replicas) if model.moe.experts % n == 0]
        fix = f"expert: {either(works)}, or more ranks"
        yield Problem(f"{at}.expert", str(expert), expected, fix)


def _check_optimizer(optimizer: OptimizerSettings, at: str) -> Iterator[Problem]:
    if optimizer.schedule == "constant" and optimizer.min_lr:
        expected = "no such setting: a constant rate does not decay"
        yield Problem(f"{at}.min_lr", str(optimizer.min_lr), expected, "min_lr: 0")
    elif optimizer.min_lr > optimizer.lr:
        yield Problem(f"{at}.min_lr", str(optimizer.min_lr), f"at most lr ({optimizer.lr})")
    if optimizer.schedule != "wsd":
        if optimizer.decay is not None:
            expected = f"no such setting: schedule {optimizer.schedule} has no decay share"
            fix = "remove it, or set schedule: wsd"
            yield Problem(f"{at}.decay", str(optimizer.decay), expected, fix)
        return
    decay = optimizer.decay_share
    if optimizer.warmup + decay > 1:
        got = f"{decay}" + ("" if optimizer.decay else " (the default)")
        expected = f"at most what the warm-up leaves of the stage ({1 - optimizer.warmup:.3g})"
        yield Problem(f"{at}.decay", got, expected, "less warmup or less decay")


def _check_length(stage: StageSettings, at: str) -> Iterator[Problem]:
    context = stage.parallel.context
    if stage.length < context:
        expected = f"at least {context}: every one of the context ranks needs a token"
        fix = f"length: {context}, or parallel.context: {stage.length} at most"
        yield Problem(f"{at}.length", str(stage.length), expected, fix)


def _check_batch(stage: StageSettings, at: str, ranks: int) -> Iterator[Problem]:
    tokens, length = stage.batch_tokens, stage.length
    data = ranks // model_ranks(stage)
    known = ranks % model_ranks(stage) == 0
    unit = length * stage.micro_batch * data if known else length
    if tokens % unit == 0:
        return
    expected = f"a multiple of {length} (length)"
    if known and data * stage.micro_batch > 1:
        expected = (
            f"a multiple of {unit} (length {length} x micro_batch {stage.micro_batch} "
            f"x {data} data-parallel ranks)"
        )
    yield Problem(f"{at}.batch_tokens", str(tokens), expected, around("batch_tokens", tokens, unit))
