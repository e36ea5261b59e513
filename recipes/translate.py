"""Pydantic's errors in plain words: the path that the user wrote, what was expected, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from ..errors import Problem
from .document import describe
from .recipe import Key, Recipe, dotted, follow, written_at

_WHOLE = "a whole number"
_EXPECTED = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text; quote it if it looks like a number",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a block of settings",
    "model_attributes_type": "a block of settings",
    "dict_type": "a block of settings",
    "invalid_key": "a key that is text",
    "recursion_loop": "a value that does not contain itself",
    "string_pattern_mismatch": "one line of letters, digits, - and _ that starts with a letter",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
    "too_short": ("min_length", "a list of at least"),
}


def translate(
    error: ValidationError, model: type[BaseModel], written: dict[str, Any]
) -> list[Problem]:
    """One problem per mistake, in the order of the settings.

    Args:
        error: What validating the recipe raised.
        model: The class that it was validated as.
        written: The recipe as the user wrote it, `defaults` not yet merged into the stages.
    """
    problems: dict[Problem, None] = {}
    for detail in error.errors(include_url=False):
        # Entries that were refused are not counted; what is wrong with them is said already.
        if detail["type"] == "too_short" and detail["input"]:
            continue
        found = _Found(model, detail["loc"])
        keys = written_at(written, found.keys)
        problems[_problem(detail, found, keys, written)] = None
    return list(problems)


def nearest(name: str, names: Sequence[str]) -> str:
    """`did you mean ...?` with the names that resemble `name`; empty when none does."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


class _Found:
    """A place in the settings: its keys without pydantic's union tags, its block and field."""

    def __init__(self, model: type[BaseModel], location: Sequence[Key]) -> None:
        self.keys: list[Key] = []
        self.block: type[BaseModel] = model
        self.field: FieldInfo | None = None
        here = [model]
        for part in location:
            if len(here) > 1 and isinstance(part, str):
                here = [
                    kind for kind in here if part in get_args(kind.model_fields["kind"].annotation)
                ]
                continue
            self.keys.append(part)
            if isinstance(part, str) and here:
                self.block = here[0]
                self.field = fields(self.block).get(part)
                here = _blocks(self.field.annotation) if self.field else []


def fields(block: type[BaseModel]) -> dict[str, FieldInfo]:
    """The settings of a block by the names that recipes use."""
    return {field.alias or name: field for name, field in block.model_fields.items()}


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for inner in get_args(annotation) for block in _blocks(inner)]


def _problem(detail: Any, found: _Found, keys: list[Key], written: dict[str, Any]) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    value, depth = follow(written, keys)
    got = describe(value if depth == len(keys) else detail["input"])
    if kind == "missing":
        return Problem(dotted(keys), "nothing", _meaning(found.field), f"add `{keys[-1]}: ...`")
    if kind == "extra_forbidden":
        return _unknown_key(keys, found.block)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        tags = tags if kind == "union_tag_invalid" else _tags(found)
        tag = str(context.get("tag", "nothing"))
        return Problem(f"{dotted(keys)}.kind", tag, _either(tags), nearest(tag, tags))
    if kind == "literal_error":
        choices = _literals(found.field.annotation) if found.field else []
        return Problem(dotted(keys), got, _either(choices), nearest(str(value), choices))
    if kind == "tuple_type" and depth == len(keys) and not isinstance(value, dict):
        return Problem(dotted(keys), got, "a list", f"write it as [{got}]")
    example = _example(found.field) if kind.startswith("int_") else ""
    return Problem(dotted(keys), got, _expected(kind, context, detail["msg"]) + example)


def _literals(annotation: Any) -> list[str]:
    """The values of a Literal, also of one that may be left out."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _literals(inner)]


def _example(field: FieldInfo | None) -> str:
    schemas = [part for part in field.metadata if isinstance(part, WithJsonSchema)] if field else []
    examples = (schemas[0].json_schema or {}).get("examples", []) if schemas else []
    return f" such as {examples[0]}" if examples else ""


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{words} {context[bound]}"
    return _EXPECTED.get(kind) or message.removeprefix("Input should be ")


def _unknown_key(keys: list[Key], block: type[BaseModel]) -> Problem:
    top = len(keys) == 1 and issubclass(block, Recipe)
    names = [*fields(block), *(["defaults", "base"] if top else [])]
    expected = f"one of {', '.join(names)}"
    return Problem(dotted(keys), "an unknown key", expected, nearest(str(keys[-1]), names))


def _meaning(field: FieldInfo | None) -> str:
    about = " ".join((field.description or "").split()) if field else ""
    return f"a value ({about.rstrip('.')})" if about else "a value"


def _tags(found: _Found) -> list[str]:
    blocks = _blocks(found.field.annotation) if found.field else []
    return [tag for block in blocks for tag in get_args(block.model_fields["kind"].annotation)]


def _either(choices: Sequence[str]) -> str:
    return f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
