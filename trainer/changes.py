"""Changes: the leaves in which two nested values differ, as lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The leaves that differ, as `stages.0.length: 1024 -> 4096`.

    Args:
        old: A value as JSON has it.
        new: The value that takes its place.
        path: Where both lie; empty at the top.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, after, f"{path}.{index}" if path else str(index))
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
