"""Recipes from YAML: a shipped name or a file, what it is based on, and changes to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import Problem, RecipeError
from ..trainer.settings import TRACKING_WORDS, merge
from .document import describe, read_document
from .overrides import apply_overrides
from .pretrained import REPLACED, fill_in, starts_from_weights
from .recipe import Recipe
from .translate import nearest, translate

_LIBRARY = Path(__file__).parent / "library"
_OWN = ("name", "summary")


def shipped_recipes() -> dict[str, Path]:
    """Name and file of the recipes that come with longspan, sorted."""
    return {path.stem: path for path in sorted(_LIBRARY.glob("*.yaml"))}


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that is valid by itself; `recipes.check` says whether it can run here.

    Args:
        reference: The name of a shipped recipe, or the path of a YAML file.
        overrides: Changes such as `stages.0.tokens=2M`; they count after everything in files.

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    path = _find(reference, Path())
    written = _read(path, [])
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-_") or "recipe"
    written, problems = apply_overrides({"name": stem, **written}, overrides)
    filled, contradictions = fill_in(written)
    recipe, more = _validate(filled)
    if recipe is None or problems or contradictions:
        raise RecipeError(reference, [*problems, *contradictions, *more])
    recipe._written = written
    return recipe


def _validate(written: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or what is wrong with its structure."""
    settings, problems = dict(written), []
    if not isinstance(written.get("defaults", {}), dict):
        got = describe(written["defaults"])
        problems.append(Problem("defaults", got, "a block of settings that stages share"))
    if problems or not isinstance(written.get("stages"), list):
        settings.pop("defaults", None)
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        return None, [*problems, *translate(error, Recipe, written)]
    except RecursionError:
        return None, [Problem("recipe", "a value that contains itself", "plain settings")]
    return (None, problems) if problems else (recipe, [])


def _find(reference: str, folder: Path) -> Path:
    """The file of a recipe: a name without ending or slash is a shipped recipe."""
    shipped, path = shipped_recipes(), folder / Path(reference).expanduser()
    if reference in shipped:
        return shipped[reference]
    if path.suffix in (".yaml", ".yml") or path.is_file() or "/" in reference:
        return path
    names = ", ".join(shipped)
    fix = nearest(reference, list(shipped)) or "a file needs its ending, such as ./mine.yaml"
    problem = Problem("recipe", reference or "nothing", f"a YAML file, or one of {names}", fix)
    raise RecipeError(reference, [problem])


def _in_full(written: dict[str, Any]) -> dict[str, Any]:
    """A file's settings without short forms, which another file could not change in part."""
    word = written.get("tracking")
    block = TRACKING_WORDS.get(word) if isinstance(word, str) else None
    return {**written, "tracking": dict(block)} if block else written


def _read(path: Path, below: list[Path]) -> dict[str, Any]:
    """A recipe file merged over the one that it is based on.

    Args:
        path: The file.
        below: The files that led here by their `base`.
    """
    chain = [*below, path.resolve()]
    if path.resolve() in below:
        circle = " -> ".join(file.name for file in chain)
        problem = Problem("base", circle, "a recipe that does not build on itself")
        raise RecipeError(str(chain[0]), [problem])
    written = _in_full(read_document(path))
    if "base" not in written:
        return written
    base = written.pop("base")
    if not isinstance(base, str) or not base:
        problem = Problem("base", describe(base), "the name or the path of a recipe")
        raise RecipeError(str(path), [problem])
    inherited = _read(_find(base, path.parent), chain)
    dropped = (*_OWN, *REPLACED) if starts_from_weights(written) else _OWN
    return merge({key: value for key, value in inherited.items() if key not in dropped}, written)
