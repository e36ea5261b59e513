"""`model: {from: ...}`: a recipe takes its model, RoPE and tokenizer from a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import LongspanError, Problem
from ..trainer.settings import SCHEME, ModelSettings, merge
from .document import describe

REPLACED = ("model", "tokenizer")
"""Blocks of a base recipe that mean nothing to a recipe which names a checkpoint."""


def starts_from_weights(written: dict[str, Any]) -> bool:
    """Whether a recipe itself, not the one it is based on, names a checkpoint."""
    model = written.get("model")
    return isinstance(model, dict) and "from" in model


def fill_in(written: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The settings with everything that `model.from` decides, and what contradicts it.

    The shape of the model is the checkpoint's. Its RoPE is what stages start from, setting by
    setting, and its tokenizer the run's, where the recipe has none. What a recipe says about the
    shape must agree, so that a resolved recipe can be read again.
    """
    model = written.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("from"), str):
        return written, []
    source = model["from"]
    if not source.startswith(SCHEME) or source == SCHEME:
        expected = "the folder of a Hugging Face checkpoint, as hf:/path/to/folder"
        return written, [Problem("model.from", source, expected, f"from: {SCHEME}{source}")]
    # Reading a checkpoint's config needs more modules than other recipes should load.
    from ..trainer.convert.hf_config import read_config

    folder = Path(source.removeprefix(SCHEME)).expanduser().absolute()
    try:
        found = read_config(folder)
    except LongspanError as error:
        expected = "a checkpoint that longspan can read"
        return written, [Problem("model.from", f"{source} ({error.what})", expected, error.fix)]
    shape = found.model.model_dump(mode="json") | {"vocab": found.vocab}
    shape = _with_free_settings(shape, model)
    problems = _contradictions(model, shape, source)
    if not isinstance(written.get("tokenizer", {}), dict):
        return written, problems
    tokenizer = written.get("tokenizer") or {"kind": "hf", "path": str(folder)}
    if tokenizer.get("kind") == "train":
        fix = "remove tokenizer: the checkpoint's own is taken"
        expected = "a tokenizer that exists: the model has been trained with one"
        problems.append(Problem("tokenizer.kind", "train", expected, fix))
    defaults = written.get("defaults", {})
    if isinstance(defaults, dict) and isinstance(defaults.get("rope", {}), dict):
        rope = merge(found.rope.model_dump(mode="json"), defaults.get("rope", {}))
        defaults = defaults | {"rope": rope}
    filled = {
        "model": shape | {"from": f"{SCHEME}{folder}"},
        "tokenizer": tokenizer,
        "defaults": defaults,
    }
    return written | filled, problems


def _with_free_settings(shape: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What does not change the model's meaning is the recipe's: the load-balancing loss."""
    experts, said = shape["moe"], model.get("moe")
    if experts is None or not isinstance(said, dict) or "aux_loss" not in said:
        return shape
    return shape | {"moe": experts | {"aux_loss": said["aux_loss"]}}


def _contradictions(model: dict[str, Any], shape: dict[str, Any], source: str) -> list[Problem]:
    """What the recipe says about the model and the checkpoint says otherwise."""
    problems = []
    expected_model = ModelSettings.model_validate(shape)
    for key, value in model.items():
        if key == "from":
            continue
        try:
            said = ModelSettings.model_validate(merge(shape, {key: value}))
        except ValidationError:
            said = None
        if said != expected_model:
            has = describe(shape.get(key, "no such setting"))
            fix = f"remove it: {source} decides the model's shape"
            problems.append(Problem(f"model.{key}", describe(value), has, fix))
    return problems
