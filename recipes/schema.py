"""The JSON Schema of recipe files, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from .recipe import Recipe

_BASE = {
    "type": "string",
    "description": "A shipped recipe, or the path of a file next to this one, that this changes.",
}
_DEFAULTS = {
    "$ref": "#/$defs/StageSettings",
    "description": "Settings of all stages, where a stage does not say otherwise.",
}


def recipe_schema() -> dict[str, Any]:
    """What a recipe file may hold.

    Only `kind` is required anywhere: a base or `defaults` may supply everything else, and
    `longspan check` says what is missing in the end.
    """
    schema = Recipe.model_json_schema()
    for block in (schema, *schema["$defs"].values()):
        block["required"] = [name for name in block.get("required", []) if name == "kind"]
    schema["properties"] = {"base": _BASE, **schema["properties"], "defaults": _DEFAULTS}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "longspan recipe"}
    return {**schema, **head}
