"""Changes from the command line: `stages.0.tokens=2M`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import Problem
from .document import describe, parse_value
from .recipe import Key, dotted

_EXAMPLE = "write it as --set stages.0.tokens=2M"


def apply_overrides(
    written: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """A recipe with changes, in order, and the problems of those that were left out.

    Args:
        written: The recipe as read; not changed.
        overrides: `path=value`; the value is YAML, list entries are counted from 0.
    """
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            problems.append(Problem(f"--set {override}", "no path=value", "path=value", _EXAMPLE))
            continue
        try:
            written = _with(written, keys, parse_value(text), [])
        except _NoSuchPlace as error:
            problems.append(Problem(dotted(keys), error.found, error.expected, _EXAMPLE))
        except ValueError as error:
            got = f"{text} ({error})"
            problems.append(Problem(dotted(keys), got, "a YAML value", "quote it: 'path=\"text\"'"))
    return written, problems


class _NoSuchPlace(Exception):
    def __init__(self, found: str, expected: str) -> None:
        self.found, self.expected = found, expected


def _with(node: Any, keys: Sequence[str], value: Any, above: list[Key]) -> Any:
    """`node` with `value` at `keys`; shared parts (YAML aliases) stay as they were elsewhere."""
    if not keys:
        return value
    key, place = keys[0], dotted(above)
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            count = f"{place} has {len(node)} {'entry' if len(node) == 1 else 'entries'}"
            raise _NoSuchPlace(f"index {key}", f"a number below {len(node)}: {count}")
        index = int(key)
        changed = _with(node[index], keys[1:], value, [*above, index])
        return [*node[:index], changed, *node[index + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise _NoSuchPlace(
            f"{key} inside {place}, which is {describe(node)}", "a block of settings"
        )
    inside = node or {}
    return {**inside, key: _with(inside.get(key), keys[1:], value, [*above, key])}
