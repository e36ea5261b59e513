"""The model card of an exported checkpoint: where its weights come from."""

from __future__ import annotations

import json
from collections.abc import Sequence

import yaml

from ...attention.catalogue import words
from ...redact import redact
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.manifest import MANIFEST
from ..data.settings import DataSettings, StdlibSource
from ..observe.events import read_events
from ..plan import plan_stage
from ..run_directory import RunDirectory
from ..settings import RunSettings, StageSettings


def model_card(
    directory: RunDirectory, run: RunSettings, checkpoint: CheckpointFiles, name: str
) -> str:
    """README.md of an export.

    Args:
        directory: The run.
        run: Its settings.
        checkpoint: The exported checkpoint of the run.
        name: The model's name.
    """
    state = json.loads(checkpoint.read(MANIFEST))
    cursor = state["cursor"]
    environment = directory.read_environment()
    start = f"the weights of `{run.model.weights}`" if run.model.weights else "random weights"
    stages = _stages(run, cursor["tokens"], state["ranks"])
    packages = environment.get("packages", {})
    versions = ", ".join(f"{package} {packages[package]}" for package in sorted(packages))
    return f"""\
---
library_name: transformers
tags: [longspan]
---

# {name}

Trained with longspan {environment.get("longspan", "")} from {start}: recipe
`{environment.get("recipe", "")}` (settings {state["recipe"]}), step {cursor["step"]:,},
{cursor["tokens"]:,} tokens, weights in {run.precision}.

## Stages

{_table(("stage", "length", "tokens", "attention", "RoPE", "learning rate", "layout"), stages)}

## Data

{_data(run)}

## Evaluation

{_evaluation(directory, cursor["step"])}

## Exactness

{_exactness(directory)} The order of the data is a function of the seed ({run.seed}),
the stage and the number of the sequence, whatever the number of ranks. Versions: {versions}.

## Recipe

```yaml
{yaml.safe_dump(redact(run.model_dump(mode="json")), sort_keys=False, allow_unicode=True).rstrip()}
```
"""


def _stages(run: RunSettings, tokens: int, ranks: int) -> list[tuple[str, ...]]:
    """A row per stage, with what it had of the `tokens` trained on up to the checkpoint."""
    rows, left = [], tokens
    for stage in run.stages:
        planned = plan_stage(stage, ranks).steps * stage.batch_tokens
        done = min(left, planned)
        left -= done
        trained = f"{done:,}" if done == planned else f"{done:,} of {planned:,}"
        optimizer = stage.optimizer
        rate = f"{optimizer.lr:g}, {optimizer.schedule}"
        attention = words(stage.attention, run.model.layers)
        row = (stage.name, f"{stage.length:,}", trained, attention, stage.rope.words, rate)
        rows.append((*row, _layout(stage)))
    return rows


def _layout(stage: StageSettings) -> str:
    parallel = stage.parallel
    degrees = ("tensor", "pipeline", "context", "expert")
    words = [f"{name} {getattr(parallel, name)}" for name in degrees if getattr(parallel, name) > 1]
    return ", ".join(words) or "data parallel"


def _data(run: RunSettings) -> str:
    """The sources of each stage; stages with the same ones share a line."""
    by_data: dict[DataSettings, list[str]] = {}
    for stage in run.stages:
        by_data.setdefault(stage.data, []).append(stage.name)
    lines = []
    for data, stages in by_data.items():
        sources = [
            source.kind
            if isinstance(source, StdlibSource)
            else f"{source.kind}: {', '.join(f'`{path}`' for path in source.paths)}"
            for source in data.sources
        ]
        share = f"{data.held_out:.0%} of the documents held out"
        lines.append(f"- {', '.join(stages)}: {'; '.join(sources)} ({share})")
    return "\n".join(lines)


def _evaluation(directory: RunDirectory, step: int) -> str:
    """What was measured on held-out documents at the exported step."""
    found = [
        event
        for event in read_events(directory.events)
        if event["event"] == "evaluated" and event.get("step") == step
    ]
    lines = [
        f"- {event.get('name')}: "
        + ", ".join(
            f"{key} {value:.4g}"
            for key, value in event.get("values", {}).items()
            if isinstance(value, int | float)
        )
        for event in found
    ]
    return "\n".join(lines) or "Not evaluated at this step."


def _exactness(directory: RunDirectory) -> str:
    starts = [e for e in read_events(directory.events) if e["event"] == "run_started"]
    ranks = {event.get("ranks") for event in starts}
    attempts = f"{len(starts)} attempt{'s' if len(starts) != 1 else ''}"
    if len(ranks) <= 1:
        return (
            f"Trained in {attempts} on {next(iter(ranks), '?')} ranks. On a CPU, the same recipe "
            "on the same layout and versions gives these weights bit for bit, interrupted or not."
        )
    numbers = " and ".join(str(number) for number in sorted(ranks, key=str))
    return (
        f"Trained in {attempts} on {numbers} ranks: the same data and schedule as in one attempt, "
        "with other rounding."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
