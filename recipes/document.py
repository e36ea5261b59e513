"""YAML in, plain Python out: `safe_load` without its surprises, and errors that name a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import Problem, RecipeError

_CHANGED = (":bool", ":float", ":timestamp")
_KEPT = {
    first: [entry for entry in entries if not entry[0].endswith(_CHANGED)]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"


class _Loader(yaml.SafeLoader):
    """Refuses keys given twice; `off` and dates stay text, `3e-4` is a number, as in YAML 1.2."""

    yaml_implicit_resolvers = _KEPT

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in lines:
                again = f"key `{key.value}` again, after line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, again, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT})$"), list("-+.0123456789")
)


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or holds something else.
    """
    try:
        content = _parse(path.read_bytes())
    except OSError as error:
        fix = "give the path of a YAML file, or a name from `longspan recipes`"
        problem = Problem(str(path), error.strerror or str(error), "a file that can be read", fix)
        raise RecipeError(str(path), [problem]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(str(path), [_syntax_problem(str(path), error)]) from None
    except RecursionError:
        problem = Problem(str(path), "mappings or lists nested too deeply", "a recipe")
        raise RecipeError(str(path), [problem]) from None
    if not isinstance(content, dict):
        fix = "write `key: value` lines; `longspan recipes` lists examples"
        problem = Problem(str(path), describe(content), "a mapping of settings", fix)
        raise RecipeError(str(path), [problem])
    return content


def parse_value(text: str) -> Any:
    """A value as it would stand in a recipe: `2M`, `true`, `[a, b]`, `{kind: train}`.

    Raises:
        ValueError: It is not YAML.
    """
    try:
        return _parse(text.encode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(getattr(error, "problem", None) or "not YAML") from None


def describe(value: Any) -> str:
    """A value for a message: short, and as it would be written."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = repr(text) if isinstance(value, str) and not text.strip() else text
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _parse(content: bytes) -> Any:
    return yaml.load(content, _Loader)


def _syntax_problem(name: str, error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"{name} line {mark.line + 1}, column {mark.column + 1}" if mark else name
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
    return Problem(where, str(what), "YAML", "mend that line: spaces for indentation, quoted text")
