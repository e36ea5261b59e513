"""Fit: whether a recipe can run on a cluster, by everything that can be known before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import Problem, RecipeError
from ..recipes.check import check_recipe, count
from ..recipes.recipe import Recipe
from ..trainer.data.settings import LocalTokenizer, StdlibSource
from ..trainer.devices import Machine
from ..trainer.gang_sizes import gang_sizes
from ..trainer.plan import run_ranks
from .clusters import Cluster
from .placement import split_groups, unit_of
from .shape import Shape
from .tracking import tracking_warnings

_UNSEEN = re.compile(r"(?:stages\.\d+|defaults)\.data\.sources\b|tokenizer\.path$")


@dataclass(frozen=True)
class Fit:
    """How a recipe fits on a cluster.

    Attributes:
        ranks: Processes that it wants.
        begins: Processes that it would begin with, where there is no room for all of them.
        nodes: Nodes that these are put on; 0 where that is not known.
        warnings: What works, but may not be wanted.
    """

    ranks: int
    begins: int
    nodes: int
    warnings: tuple[str, ...]


def fit(recipe: Recipe, cluster: Cluster, shape: Shape) -> Fit:
    """Check everything about a recipe on a cluster.

    Args:
        recipe: A recipe whose structure is valid.
        cluster: Where it shall run.
        shape: What the cluster has.

    Raises:
        RecipeError: All problems of the recipe.
    """
    ranks = run_ranks(recipe, shape.gpus)
    unit = unit_of(recipe, max(shape.slots or (ranks,)))
    problems, warnings, begins = _room(recipe, ranks, unit, cluster, shape)
    if split := split_groups(recipe, unit):
        warnings.append(f"parallel: {split}")
    problems += _relative(recipe)
    warnings += tracking_warnings(recipe.tracking, cluster.settings.secrets, cluster.name)
    known = {problem.path for problem in problems}
    for problem in _check(recipe, ranks, shape, warnings):
        if _UNSEEN.match(problem.path) and not Path(cluster.settings.storage).is_dir():
            warnings.append(f"{problem.path}: {problem.value} cannot be checked from here")
        elif problem.path not in known:
            problems.append(problem)
    if problems:
        raise RecipeError(recipe.name, problems)
    return Fit(ranks, begins, shape.nodes_for(begins, unit), tuple(warnings))


def _check(recipe: Recipe, ranks: int, shape: Shape, warnings: list[str]) -> tuple[Problem, ...]:
    """What `longspan check` would say on a node; its warnings are added to the list."""
    local = min(ranks, max(shape.slots or (ranks,)))
    # Whether there are as many GPUs has been said in other words.
    machine = Machine(gpus=local if shape.gpu else 0, cores=local, world=ranks, local=local)
    try:
        warnings += check_recipe(recipe, machine).warnings
    except RecipeError as error:
        return error.problems
    return ()


def _room(
    recipe: Recipe, ranks: int, unit: int, cluster: Cluster, shape: Shape
) -> tuple[list[Problem], list[str], int]:
    """Whether all ranks have room, or fewer that would do; problems, warnings, and how many."""
    most = shape.most(unit)
    if most is None or ranks <= most:
        return [], [], ranks
    has = f"cluster {cluster.name} has {shape.words}, says {shape.said_by}"
    if recipe.ranks and (fewer := [size for size in gang_sizes(recipe) if size <= most]):
        words = f"ranks: {has}; the run would begin with {fewer[0]} of {count(ranks, 'rank')}"
        return [], [f"{words} (ranks_at_least)"], fewer[0]
    expected = f"at most {count(most, shape.device)}: {has}"
    if most < sum(shape.slots or ()):
        expected = f"at most {most}: {has}, and {unit} ranks (tensor x context) stay on one node"
    fixes = [f"ranks: {most} and smaller parallel degrees, or another cluster"] if most else []
    if shape.said_by != "clusters.yaml":
        fixes.append(f"for a cluster that grows, nodes: of {cluster.name} in clusters.yaml")
    return [Problem("ranks", str(ranks), expected, "; ".join(fixes))], [], ranks


def _relative(recipe: Recipe) -> Iterator[Problem]:
    """Paths that mean something else on a node, which starts in a folder of its own."""
    expected = "an absolute path: a node has another working directory"
    for index, stage in enumerate(recipe.stages):
        for number, source in enumerate(stage.data.sources):
            if isinstance(source, StdlibSource):
                continue
            for path in source.paths:
                if not path.startswith("/"):
                    place = recipe.where(f"stages.{index}.data.sources.{number}.paths")
                    yield Problem(place, path, expected, f"{Path(path).expanduser().absolute()}")
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, LocalTokenizer) and not tokenizer.path.startswith("/"):
        fix = f"path: {Path(tokenizer.path).expanduser().absolute()}"
        yield Problem("tokenizer.path", tokenizer.path, expected, fix)
