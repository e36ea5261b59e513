"""Forecast: how long a recipe will train.

From the newest run that was equal but for its length; else from arithmetic, which is a wide guess.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes.recipe import Recipe
from ..trainer.flops import peak_flops, training_flops
from ..trainer.observe.events import read_events
from ..trainer.parameters import likely_vocabulary
from ..trainer.plan import plan_stage
from .registry import Record, Registry

_LEAST_STEPS = 3
USUAL_MFU = (0.2, 0.4)
"""Of GPUs' peaks, what training usually reaches."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        tokens: It trains on.
        hours: Of training; None where no rate is known.
        rate: Tokens per second over all stages; None as well.
        run: The run that the rates are from.
        span: The fewest and the most hours of training where no rate is known, but the GPUs are.
        peak: The GPUs' FLOP/s that these are computed with.
    """

    tokens: int
    hours: float | None = None
    rate: float | None = None
    run: str = ""
    span: tuple[float, float] | None = None
    peak: float = 0.0


def shape_key(recipe: Recipe, ranks: int, where: str) -> str:
    """Sixteen hex digits that runs share whose steps take equally long.

    Args:
        recipe: The recipe.
        ranks: Its processes.
        where: The name of the cluster, or empty for this machine.
    """
    run = recipe.run().model_dump(mode="json")
    model = {key: value for key, value in run["model"].items() if key not in ("from", "init")}
    names = ("name", "length", "batch_tokens", "micro_batch", "parallel", "attention", "trainable")
    stages = [{name: stage.get(name) for name in names} for stage in run["stages"]]
    kept = [model, stages, run["precision"], run["recompute"], ranks, where]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def forecast(
    recipe: Recipe, ranks: int, key: str, registry: Registry, gpu_names: Sequence[str] = ()
) -> Forecast:
    """The forecast for a recipe.

    Args:
        recipe: The recipe.
        ranks: Its processes.
        key: See `shape_key`.
        registry: Knows the runs before.
        gpu_names: Of the GPUs that it may get; for a CPU there is no peak to go by.
    """
    budget = {
        stage.name: plan_stage(stage, ranks).steps * stage.batch_tokens for stage in recipe.stages
    }
    tokens = sum(budget.values())
    for record in registry.records():
        if record.shape == key and (rates := _rates(record)) and rates.keys() >= budget.keys():
            seconds = sum(budget[name] / rates[name] for name in budget)
            return Forecast(tokens, seconds / 3600, tokens / seconds, record.id)
    # All wait for the slowest; and fp32 has another peak than the one that is known.
    peaks = [peak_flops(name) for name in gpu_names] if recipe.precision == "bf16" else []
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return Forecast(tokens)
    flops = _flops(recipe, ranks)
    least, most = (flops / (ranks * min(known) * mfu) / 3600 for mfu in reversed(USUAL_MFU))
    return Forecast(tokens, span=(least, most), peak=min(known))


def _flops(recipe: Recipe, ranks: int) -> float:
    """What the model needs for all stages, with documents as long as the stage's sequences."""
    vocab = likely_vocabulary(recipe)
    return sum(
        plan_stage(stage, ranks).steps
        * stage.batch_tokens
        * training_flops(recipe.model, stage, vocab)
        for stage in recipe.stages
    )


def _rates(record: Record) -> Mapping[str, float]:
    """Tokens per second of the stages of a run whose folder is visible here."""
    seen: dict[str, list[float]] = {}
    for stage, rate in _steps(record):
        seen.setdefault(stage, []).append(rate)
    # The first step of a stage warms up, and a mean of times is no mean of rates.
    return {
        stage: (len(rates) - 1) / sum(1 / rate for rate in rates[1:])
        for stage, rates in seen.items()
        if len(rates) >= _LEAST_STEPS
    }


def _steps(record: Record) -> Iterator[tuple[str, float]]:
    for event in read_events(record.directory.events):
        rate: Any = event.get("tokens_per_s")
        if event.get("event") == "step" and isinstance(rate, int | float) and rate > 0:
            yield str(event.get("stage")), float(rate)
