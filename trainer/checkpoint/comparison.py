"""Comparison: how two checkpoints differ, in their settings and parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..changes import changes
from .manifest import Manifest, read_manifest
from .reference import Reference, RunStore
from .stored import VOCAB, Kind, StoredState
from .survey import columns
from .verbs import Report

# What differs between any two checkpoints, or is a hash of what is shown by itself.
_NOISE = ("created", "recipe")
# What a recipe does not say.
_OWN = ("stage_name", "ranks", "conditions", "vocab")


@dataclass(frozen=True)
class Difference:
    """How a tensor differs.

    Attributes:
        absolute: Largest difference of an element; NaN where one of both is.
        relative: The same, over the largest absolute value of the first.
        elements: How many are not equal bit by bit.
    """

    absolute: float
    relative: float
    elements: int


def compare(
    left: str, right: str, *, moments: bool, folder: Callable[[str], Path] = Path
) -> Report:
    """Compare two checkpoints, of one run or of two.

    Args:
        left: `RUN` or `RUN@STEP`.
        right: The same, or a step of the same run.
        moments: Compare the optimizer's moments too.
        folder: Of a run, by what the user calls it.

    Returns:
        What differs. It is good when every parameter is there in both and bit-equal.

    Raises:
        LongspanError: One of them is not there, or cannot be read.
    """
    first = Reference.parse(left, folder=folder)
    second = Reference.parse(right, first, folder)
    (run, files), (other_run, other_files) = first.find(), second.find()
    before, after = read_manifest(files), read_manifest(other_files)
    settings = list(_settings(run, other_run, before, after))
    kinds: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq") if moments else ("weight",)
    parameters, good = _parameters(StoredState(files), StoredState(other_files), kinds)
    return Report(
        [
            f"{files} -> {other_files}",
            f"step {before.cursor.step:,} -> {after.cursor.step:,}",
            *(f"  {line}" for line in settings or ["settings: no difference"]),
            *parameters,
        ],
        good,
    )


def difference(left: torch.Tensor, right: torch.Tensor) -> Difference | None:
    """How two fp32 tensors of one shape differ; None where they are equal bit by bit."""
    unequal = int((left.view(torch.int32) != right.view(torch.int32)).sum())
    if not unequal:
        return None
    absolute = (left - right).abs().max().item()
    scale = left.abs().max().item()
    return Difference(absolute, absolute / scale if scale else float("inf"), unequal)


def _settings(run: RunStore, other: RunStore, before: Manifest, after: Manifest) -> Iterator[str]:
    """Settings that differ: of the recipes where there are two, else of the stages."""
    if run.directory.path == other.directory.path:
        yield from changes(_without(before, _NOISE), _without(after, _NOISE))
        return
    mine, theirs = (each.settings.model_dump(mode="json") for each in (run, other))
    yield from changes(mine, theirs)
    mine, theirs = ({key: m.info.get(key) for key in _OWN} for m in (before, after))
    yield from changes(mine, theirs)


def _without(manifest: Manifest, keys: tuple[str, ...]) -> dict[str, object]:
    return {key: value for key, value in manifest.info.items() if key not in keys}


def _parameters(
    left: StoredState, right: StoredState, kinds: tuple[Kind, ...]
) -> tuple[list[str], bool]:
    """Lines about the parameters, and whether all are bit-equal."""
    mine, theirs = left.index.parameters, right.index.parameters
    missing = [f"  missing: {name}" for name in mine if name not in theirs]
    added = [f"  added: {name}" for name in theirs if name not in mine]
    rows: list[tuple[str, ...]] = [("parameter", "kind", "max abs", "relative", "elements")]
    other_shapes, equal, compared = [], 0, 0
    for name in (name for name in mine if name in theirs):
        for kind in kinds:
            compared += 1
            pair = _pair(left, right, name, kind)
            if pair is None:
                shapes = list(mine[name].shape), list(theirs[name].shape)
                other_shapes.append(f"  shape: {name}: {shapes[0]} -> {shapes[1]}")
                break
            found = difference(*pair)
            if found is None:
                equal += 1
                continue
            count = f"{found.elements:,} of {pair[0].numel():,}"
            rows.append((name, kind, f"{found.absolute:.3g}", f"{found.relative:.3g}", count))
    table = [f"  {line}" for line in columns(rows)] if len(rows) > 1 else []
    lines = [*missing, *added, *other_shapes, *table, f"{equal} of {compared} tensors bit-equal"]
    return lines, not (missing or added or other_shapes) and equal == compared


def _pair(
    left: StoredState, right: StoredState, name: str, kind: Kind
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both tensors, without rows that only one layout pads; None where the shapes differ."""
    one, two = left.full(name, kind), right.full(name, kind)
    if one.shape != two.shape and (name not in VOCAB or one.shape[1:] != two.shape[1:]):
        return None
    rows = min(len(one), len(two)) if one.dim() else None
    if rows is None:
        return one, two
    if one[rows:].any() or two[rows:].any():
        return None
    return one[:rows], two[:rows]
