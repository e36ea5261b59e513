"""Survey: what lies in a store, folder by folder, as far as names, sizes and manifests tell."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from .files import CheckpointFiles
from .folders import MARKER, Kind, step_of
from .manifest import MANIFEST, Manifest, read_manifest
from .store import Store


@dataclass(frozen=True)
class Found:
    """One folder.

    Attributes:
        name: The folder's.
        kind: What its name and its marker say.
        sizes: Bytes of its files.
        manifest: None where it has none that can be believed.
        problem: What is wrong with it, as far as sizes tell; empty for an intact checkpoint, and
            for what is not meant to be one.
    """

    name: str
    kind: Kind
    sizes: Mapping[str, int]
    manifest: Manifest | None = None
    problem: str = ""

    @property
    def step(self) -> int:
        """Steps done in the run."""
        return step_of(self.name)

    @property
    def size(self) -> int:
        """Bytes of all of its files."""
        return sum(self.sizes.values())

    @property
    def age(self) -> float | None:
        """Seconds since it was saved; None where it does not say."""
        try:
            return None if self.manifest is None else time.time() - self.manifest.info["created"]
        except (KeyError, TypeError):
            return None


def survey(store: Store) -> list[Found]:
    """Every folder of a store, oldest first. No data are read.

    Raises:
        CheckpointError: The store cannot be read.
    """
    return [_found(store, name, kind) for name, kind in store.listing().items()]


def committed_at(store: Store, step: int | None) -> CheckpointFiles:
    """The complete checkpoint of a step, or the newest one.

    Raises:
        CheckpointError: There is none.
    """
    names = {step_of(name): name for name in store.committed()}
    if not names:
        raise CheckpointError(f"there is no complete checkpoint at {store}", "train the run first")
    step = max(names) if step is None else step
    if step not in names:
        raise CheckpointError(
            f"there is no complete checkpoint of step {step} at {store}",
            f"steps that there are: {', '.join(map(str, sorted(names)))}",
        )
    return CheckpointFiles(store, names[step])


def _found(store: Store, name: str, kind: Kind) -> Found:
    sizes = store.files(name)
    if kind == "damaged":
        return Found(name, kind, sizes, problem=f"it has no file {MARKER}")
    files = CheckpointFiles(store, name)
    try:
        manifest = read_manifest(files) if kind == "committed" else None
    except CheckpointError as error:
        return Found(name, "damaged", sizes, problem=error.what)
    problem = "" if manifest is None else "; ".join(_wrong_sizes(sizes, manifest))
    return Found(name, "damaged" if problem else kind, sizes, manifest, problem)


def _wrong_sizes(sizes: Mapping[str, int], manifest: Manifest) -> Iterable[str]:
    for name, wanted in manifest.files.items():
        if name not in sizes:
            yield f"{name} is missing"
        elif sizes[name] != wanted.size:
            yield f"{name} has {sizes[name]:,} bytes in place of {wanted.size:,}"
    for name in sorted(sizes.keys() - manifest.files.keys() - {MANIFEST, MARKER}):
        yield f"{name} does not belong to it"


def layout_words(info: Mapping[str, Any]) -> str:
    """The layout of what a manifest is of: `4 ranks: tensor 2, context 2`."""
    ranks = info.get("ranks", "?")
    parallel = info.get("parallel", {})
    kinds = ("tensor", "pipeline", "context", "expert")
    degrees = [f"{kind} {parallel[kind]}" for kind in kinds if parallel.get(kind, 1) != 1]
    words = f"{ranks} rank" + ("" if ranks == 1 else "s")
    return f"{words}: {', '.join(degrees)}" if degrees else words


def size_words(size: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} B"


def age_words(age: float | None) -> str:
    """An age for people; that of a clock which went backwards is 0."""
    if age is None:
        return "unknown"
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= scale:
            return f"{age / scale:.1f} {unit}"
    return f"{max(age, 0):.0f} s"


def columns(rows: Iterable[Iterable[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
