"""Index: which file of a checkpoint has which elements of which parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from ...errors import CheckpointError
from .boxes import Box, matrix
from .shard import KINDS, Entry

INDEX = "index.json"


@dataclass(frozen=True)
class Stored:
    """One box in a file: the first byte of each kind."""

    file: str
    box: Box
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class StoredParameter:
    """A parameter: its full shape, and the boxes that make it up."""

    shape: tuple[int, ...]
    boxes: tuple[Stored, ...]


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        dtype: Of the weights as the model had them; they are stored in fp32.
        parameters: By global name.
        steps: How often each parameter was updated.
    """

    dtype: str
    parameters: Mapping[str, StoredParameter]
    steps: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The index as it is stored."""
        files = sorted({at.file for p in self.parameters.values() for at in p.boxes})
        numbers = {file: number for number, file in enumerate(files)}
        parameters = {
            name: {
                "shape": list(parameter.shape),
                "steps": self.steps.get(name, 0),
                "boxes": [
                    [numbers[at.file], *astuple(at.box), *at.offsets] for at in parameter.boxes
                ],
            }
            for name, parameter in sorted(self.parameters.items())
        }
        whole = {"kinds": KINDS, "dtype": self.dtype, "files": files, "parameters": parameters}
        return json.dumps(whole, separators=(",", ":")).encode()

    @staticmethod
    def from_json(text: bytes) -> Index:
        """An index that `to_json` wrote.

        Raises:
            ValueError: Or KeyError or TypeError; it is none.
        """
        raw: dict[str, Any] = json.loads(text)
        if tuple(raw["kinds"]) != KINDS:
            raise ValueError(f"kinds {raw['kinds']}")
        files, parameters, steps = raw["files"], {}, {}
        for name, value in raw["parameters"].items():
            boxes = (
                Stored(files[row[0]], Box(*row[1:5]), tuple(row[5:])) for row in value["boxes"]
            )
            parameters[name] = StoredParameter(tuple(value["shape"]), tuple(boxes))
            steps[name] = int(value["steps"])
        return Index(raw["dtype"], parameters, steps)


def build_index(
    dtype: str, files: Iterable[tuple[str, Iterable[Entry]]], steps: Mapping[str, int]
) -> Index:
    """The index of all ranks' files.

    Args:
        dtype: Of the weights as the model has them.
        files: Names, and what lies in them.
        steps: How often each parameter was updated.

    Raises:
        CheckpointError: Elements are missing, or there twice: a mistake of ours.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, list[Stored]] = {}
    for file, entries in files:
        for entry in entries:
            if shapes.setdefault(entry.name, entry.shape) != entry.shape:
                raise CheckpointError(f"two shapes of {entry.name}", "please report this")
            boxes.setdefault(entry.name, []).append(Stored(file, entry.box, entry.offsets))
    for name in sorted({*steps, *boxes}):
        found = boxes.get(name, [])
        wanted = math.prod(matrix(shapes[name])) if found else -1
        held = sum(at.box.size for at in found)
        if held != wanted or _overlap([at.box for at in found]):
            raise CheckpointError(
                f"the ranks have other elements of {name} than it has; the checkpoint was not "
                "written",
                "please report this with the recipe",
            )
    parameters = {name: StoredParameter(shapes[name], tuple(at)) for name, at in boxes.items()}
    return Index(dtype, parameters, steps)


def _overlap(boxes: list[Box]) -> bool:
    """Whether two boxes have an element in common."""
    ordered = sorted(boxes, key=lambda box: (box.row, box.column))
    for number, box in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other.row >= box.row_end:
                break
            if box.within(other) is not None:
                return True
    return False
