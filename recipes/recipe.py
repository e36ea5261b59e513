"""The recipe: the settings that the parts own, put together and named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pydantic import Field, PrivateAttr

from ..trainer.settings import RunSettings

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Key = str | int
"""One step of a dotted path: a key of a mapping or an index of a list."""


class Recipe(RunSettings):
    """A run with a name."""

    name: str = Field(pattern=NAME)
    """Names the run directory; left out: the name of the file."""

    summary: str = Field(default="", pattern=r"^[^\n]*$")
    """One line for `longspan recipes`."""

    _written: dict[str, Any] = PrivateAttr(default_factory=dict)

    def run(self) -> RunSettings:
        """What decides the run's results: everything but the name and the summary."""
        return RunSettings.model_validate(self.model_dump(exclude={"name", "summary"}))

    def where(self, path: str) -> str:
        """The path of a setting as the user wrote it: `stages.0.length` may be in `defaults`."""
        keys = [int(key) if key.isdigit() else key for key in path.split(".")]
        return dotted(written_at(self._written, keys))


def dotted(keys: Sequence[Key]) -> str:
    """Keys as one path: `stages.0.length`."""
    return ".".join(map(str, keys))


def written_at(written: dict[str, Any], keys: Sequence[Key]) -> list[Key]:
    """Where the user wrote a stage's setting: in the stage, or in `defaults` for all stages."""
    defaults = written.get("defaults")
    if len(keys) > 2 and keys[0] == "stages" and isinstance(defaults, dict):
        stage, rest = follow(written, keys[:2])[0], keys[2:]
        if follow(defaults, rest)[1] > follow(stage, rest)[1]:
            return ["defaults", *rest]
    return list(keys)


def follow(node: Any, keys: Sequence[Key]) -> tuple[Any, int]:
    """What lies at a path, and how many of its keys exist; the deepest node that does."""
    for depth, key in enumerate(keys):
        if (isinstance(node, dict) and key in node) or (
            isinstance(node, list | tuple) and isinstance(key, int) and 0 <= key < len(node)
        ):
            node = cast(Any, node)[key]
        else:
            return node, depth
    return node, len(keys)
