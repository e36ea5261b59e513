"""Contents: everything that a checkpoint says of itself, and the norms of what it holds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .manifest import Manifest, read_manifest
from .reference import Reference
from .survey import age_words, columns, layout_words, size_words

if TYPE_CHECKING:
    from .stored import StoredState


def show(run_dir: Path, step: int | None, *, norms: bool) -> list[str]:
    """The manifest, the files and the parameters of a checkpoint, as lines.

    Args:
        run_dir: The run's folder.
        step: Which checkpoint; None: the newest.
        norms: Read all data, and give the 2-norms of every parameter and of its moments.

    Raises:
        LongspanError: There is no such run or checkpoint, or it cannot be read.
    """
    _, files = Reference(run_dir, step).find()
    manifest = read_manifest(files)
    from .stored import StoredState  # torch takes seconds

    state = StoredState(files)
    return [
        f"checkpoint {files}",
        *(f"  {line}" for line in columns(_facts(manifest))),
        "files",
        *(f"  {line}" for line in columns(_files(manifest))),
        "parameters",
        *(f"  {line}" for line in columns(_parameters(state, norms))),
    ]


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    cursor, info = manifest.cursor, dict(manifest.info)
    stage = info.pop("stage_name", f"number {cursor.stage}")
    yield "step", f"{cursor.step:,} of the run, {cursor.stage_step:,} of stage {stage}"
    yield "tokens", f"{cursor.tokens:,}; the stage goes on with sequence {cursor.next_sample:,}"
    created = info.pop("created", None)
    if isinstance(created, int | float):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created))
        yield "saved", f"{when}, {age_words(time.time() - created)} ago"
    yield "layout", layout_words(info)
    for key, value in info.items():
        yield key, value if isinstance(value, str) else json.dumps(value)


def _files(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    yield "name", "size", "sha256"
    for name, record in sorted(manifest.files.items()):
        yield name, size_words(record.size), record.sha256


def _parameters(state: StoredState, norms: bool) -> Iterator[tuple[str, ...]]:
    from .shard import KINDS

    yield ("name", "shape", "updates", *(f"|{kind}|" for kind in KINDS if norms))
    total = 0
    for name, parameter in state.index.parameters.items():
        total += math.prod(parameter.shape)
        shape = " x ".join(map(str, parameter.shape)) or "scalar"
        found = _norms(state, name) if norms else ()
        yield (name, shape, str(state.index.steps.get(name, 0)), *found)
    whole = f"{len(state.index.parameters)} parameters, {total:,} elements, {state.index.dtype}"
    yield (whole, "", "", *("" for _ in KINDS if norms))


def _norms(state: StoredState, name: str) -> Iterator[str]:
    import torch

    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        full = state.full(name, kind)
        yield f"{torch.linalg.vector_norm(full, dtype=torch.float64).item():.6g}"
