"""The rules of a stage's attention: its layers exist, its options and ranks fit its mechanisms."""

from __future__ import annotations

from collections.abc import Iterator

from ..attention.layer_settings import AttentionSettings, LayerRule
from ..attention.mechanism_settings import DenseSettings, learns_by_itself
from ..errors import Problem
from ..trainer.settings import ModelSettings, StageSettings
from .check_mechanism import check_mechanism, warn_of_mechanism


def check_attention(model: ModelSettings, stage: StageSettings, at: str) -> Iterator[Problem]:
    """What is wrong with a stage's attention.

    Args:
        model: The model.
        stage: The stage.
        at: Path of the stage, such as `stages.0`.
    """
    attention = stage.attention
    mechanisms = attention.mechanisms(model.layers)
    kinds = {mechanism.kind for mechanism in mechanisms}
    yield from _check_rules(attention, model.layers, f"{at}.attention")
    layers = _layers_of(attention, model.layers, None)
    path = f"{at}.attention.mechanism"
    yield from check_mechanism(model, stage, attention.mechanism, layers, path)
    for index, rule in enumerate(attention.layers):
        layers = _layers_of(attention, model.layers, index)
        path = f"{at}.attention.layers.{index}.mechanism"
        yield from check_mechanism(model, stage, rule.mechanism, layers, path)
    yield from _check_options(stage, kinds, f"{at}.attention")
    if stage.trainable == "selection" and not any(map(learns_by_itself, mechanisms)):
        expected = "all: no layer has a mechanism whose selection learns (seer or indexer)"
        fix = "trainable: all, or one of these mechanisms"
        yield Problem(f"{at}.trainable", "selection", expected, fix)
    if stage.trainable == "all" and "seer" in kinds:
        expected = "selection: the gate of seer learns from a model that stands still"
        yield Problem(f"{at}.trainable", "all", expected, "trainable: selection")


def warn_of_attention(model: ModelSettings, stages: tuple[StageSettings, ...]) -> Iterator[str]:
    """What works in the stages' attention, but may not be wanted."""
    if stages[0].trainable == "selection" and model.weights is None:
        yield (
            f"stage {stages[0].name}: the selection learns from a model with random weights; "
            "train it first, or start from a checkpoint (model.from)"
        )
    for stage in stages:
        for mechanism in dict.fromkeys(stage.attention.mechanisms(model.layers)):
            for text in warn_of_mechanism(mechanism, stage.length):
                yield f"stage {stage.name}: {text}"


def _layers_of(attention: AttentionSettings, layers: int, index: int | None) -> list[int]:
    """The layers whose mechanism a rule decides; without an index those that no rule names."""
    rules = list(enumerate(attention.layers))

    def decides(layer: int) -> int | None:
        return max((at for at, rule in rules if rule.names(layer, layers)), default=None)

    return [layer for layer in range(layers) if decides(layer) == index]


def _check_rules(attention: AttentionSettings, layers: int, at: str) -> Iterator[Problem]:
    kept = attention.layers
    for index, rule in enumerate(attention.layers):
        path = f"{at}.layers.{index}"
        problems = list(_check_names(rule, layers, path))
        yield from problems
        # Of two equal rules only one is too much, so the next is judged without this one.
        rest = tuple(other for other in kept if other is not rule)
        if _mechanisms(attention, rest, layers) != _mechanisms(attention, kept, layers):
            continue
        kept = rest
        if not problems:
            decides = _layers_of(attention, layers, index)
            why = "its layers have that mechanism anyway" if decides else "later rules override it"
            expected = f"a rule that changes a layer; {why}"
            yield Problem(path, rule.mechanism.kind, expected, "remove the rule")
    if attention.mechanism != DenseSettings() and not _layers_of(attention, layers, None):
        expected = "left out: a rule names every layer"
        fix = "remove it, or the rule that names too many layers"
        yield Problem(f"{at}.mechanism", attention.mechanism.kind, expected, fix)


def _mechanisms(
    attention: AttentionSettings, rules: tuple[LayerRule, ...], layers: int
) -> list[object]:
    return [*attention.model_copy(update={"layers": rules}).mechanisms(layers)]


def _check_names(rule: LayerRule, layers: int, at: str) -> Iterator[Problem]:
    """The layers that a rule names are the model's, each of them once."""
    if rule.layers is None:
        for name in ("every", "first", "last"):
            value = getattr(rule, name)
            if value is not None and value > layers:
                expected = f"at most model.layers ({layers})"
                yield Problem(f"{at}.{name}", str(value), expected)
        return
    beyond = sorted({layer for layer in rule.layers if layer >= layers})
    twice = sorted({layer for layer in rule.layers if rule.layers.count(layer) > 1})
    if beyond:
        expected = f"layers from 0 to {layers - 1} (model.layers is {layers})"
        yield Problem(f"{at}.layers", ", ".join(map(str, beyond)), expected)
    elif twice:
        expected = "each layer once"
        yield Problem(f"{at}.layers", ", ".join(map(str, twice)), expected, "name it once")
    elif not rule.layers:
        expected = "at least one layer"
        yield Problem(f"{at}.layers", "an empty list", expected, "remove the rule")


def _check_options(stage: StageSettings, kinds: set[str], at: str) -> Iterator[Problem]:
    attention = stage.attention
    if attention.output_gate != "none" and "ssa" in kinds:
        expected = "none: ssa has an output gate of its own"
        yield Problem(f"{at}.output_gate", attention.output_gate, expected, "remove output_gate")
    start = attention.log_scale_from
    if start is not None and start >= stage.length:
        expected = f"less than the stage's length ({stage.length}): up to there nothing grows"
        fix = "a smaller log_scale_from, or none in this stage"
        yield Problem(f"{at}.log_scale_from", str(start), expected, fix)
