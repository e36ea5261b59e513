"""The rules between neighbouring stages: what one adds to the model, the next can take over."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from ..attention.layer_settings import AttentionSettings
from ..attention.mechanism_settings import (
    IndexerSettings,
    MechanismSettings,
    NsaSettings,
    SeerSettings,
    learns_by_itself,
)
from ..errors import Problem
from ..trainer.settings import StageSettings

_SHAPING = {
    NsaSettings: ("compress", "compress_length", "gate"),
    SeerSettings: ("form", "dim"),
    IndexerSettings: ("share", "heads", "dim"),
}
"""Settings that decide the shape, or the meaning, of what a mechanism adds to the model."""


def check_hand_over(stages: tuple[StageSettings, ...], layers: int) -> Iterator[Problem]:
    """What is wrong between the stages' attentions.

    Args:
        stages: Of the recipe.
        layers: Of the model.
    """
    for index, stage in enumerate(stages):
        before = stages[index - 1].attention if index else AttentionSettings()
        path = f"stages.{index}.attention"
        if index:
            yield from _check_shapes(before, stage.attention, layers, path, stages[index - 1].name)
        if stage.trainable == "selection":
            yield from _check_frozen(before, stage.attention, layers, path)


def warn_of_hand_over(stages: tuple[StageSettings, ...], layers: int) -> Iterator[str]:
    """What works between the stages, but may not be wanted."""
    gone: set[str] = set()
    for before, stage in pairwise(stages):
        old, new = _adding(before.attention, layers), _adding(stage.attention, layers)
        back = sorted(new & gone)
        if back:
            yield (
                f"stage {stage.name}: {', '.join(back)} starts from the seed again, as the stage "
                "before did not have it"
            )
        gone = (gone | old) - new
        lost = sorted(name for name in old - new if name in ("output_gate", "sinks"))
        if lost:
            yield f"stage {stage.name}: the model loses {' and '.join(lost)}, which it learned with"
    learned = False
    for stage in stages:
        for mechanism in stage.attention.mechanisms(layers):
            if isinstance(mechanism, IndexerSettings):
                if mechanism.attend == "chosen" and not learned:
                    yield (
                        f"stage {stage.name}: the indexer chooses before it has learned anything; "
                        "a stage with attend: dense and trainable: selection warms it up"
                    )
                learned = True


def _adding(attention: AttentionSettings, layers: int) -> set[str]:
    """What a stage adds to the model, by name."""
    kinds = {mechanism.kind for mechanism in attention.mechanisms(layers)}
    found: set[str] = kinds & {"nsa", "ssa", "seer", "indexer"}
    found |= {"output_gate"} if attention.output_gate != "none" else set()
    return found | ({"sinks"} if attention.sinks else set())


def _check_shapes(
    before: AttentionSettings, after: AttentionSettings, layers: int, at: str, name: str
) -> Iterator[Problem]:
    """The parameters that both stages have are of one shape."""
    gates = before.output_gate, after.output_gate
    if "none" not in gates and gates[0] != gates[1]:
        expected = f"{gates[0]}, as in stage {name}: its gate is carried on"
        yield Problem(f"{at}.output_gate", gates[1], expected, f"output_gate: {gates[0]}")
    told: set[tuple[MechanismSettings, str]] = set()
    for layer in range(layers):
        old, new = before.of_layer(layer, layers), after.of_layer(layer, layers)
        for field in _SHAPING.get(type(new), ()) if type(old) is type(new) else ():
            values = getattr(old, field), getattr(new, field)
            if values[0] != values[1] and (new, field) not in told:
                told.add((new, field))
                expected = f"{values[0]}, as in stage {name}: what it learned is carried on"
                path = f"{_where(after, layer, layers, at)}.{field}"
                yield Problem(path, str(values[1]), expected, f"{field}: {values[0]}")


def _check_frozen(
    before: AttentionSettings, after: AttentionSettings, layers: int, at: str
) -> Iterator[Problem]:
    """Nothing joins the model where it stands still, as it could not learn."""
    why = "with trainable selection: what is new in the model would stay as it is drawn"
    if after.output_gate != before.output_gate and after.output_gate != "none":
        expected = f"{before.output_gate} {why}"
        yield Problem(f"{at}.output_gate", after.output_gate, expected, "add it in a stage before")
    if after.sinks and not before.sinks:
        yield Problem(f"{at}.sinks", "true", f"false {why}", "add them in a stage before")
    told: set[MechanismSettings] = set()
    for layer in range(layers):
        old, new = before.of_layer(layer, layers), after.of_layer(layer, layers)
        adds = new.kind in ("nsa", "ssa") and not learns_by_itself(new)
        if adds and new.kind != old.kind and new not in told:
            told.add(new)
            path = f"{_where(after, layer, layers, at)}.kind"
            yield Problem(path, new.kind, f"{old.kind} {why}", "begin it in a stage before")


def _where(attention: AttentionSettings, layer: int, layers: int, at: str) -> str:
    """The path of a layer's mechanism."""
    rules = [n for n, rule in enumerate(attention.layers) if rule.names(layer, layers)]
    return f"{at}.layers.{rules[-1]}.mechanism" if rules else f"{at}.mechanism"
