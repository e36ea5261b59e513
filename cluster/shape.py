"""Shape: the nodes that a cluster can give to a run, and whether a recipe fits on them."""

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
from ..trainer.plan import run_ranks
from .clusters import Cluster
from .jobs import Jobs

_UNSEEN = re.compile(r"(?:stages\.\d+|defaults)\.data\.sources\b|tokenizer\.path$")


@dataclass(frozen=True)
class Shape:
    """What a cluster has.

    Attributes:
        nodes: How many; those with GPUs where there are any.
        gpus: GPUs of each of them.
        total_gpus: Over all nodes.
        cores: CPU cores over all nodes.
        said_by: Who says so, for messages.
    """

    nodes: int
    gpus: int
    total_gpus: int
    cores: int | None
    said_by: str

    @property
    def words(self) -> str:
        """`2 nodes with 8 GPUs each`."""
        if self.total_gpus:
            each = " each" if self.nodes > 1 else ""
            even = self.gpus * self.nodes == self.total_gpus
            has = f"{count(self.gpus, 'GPU')}{each}" if even else f"{self.total_gpus} GPUs"
            return f"{count(self.nodes, 'node')} with {has}"
        cores = f" with {count(self.cores, 'CPU core')}" if self.cores else ""
        return f"{count(self.nodes, 'node')}{cores}"


def shape_of(cluster: Cluster, jobs: Jobs) -> tuple[Shape, list[str]]:
    """What a cluster can give: as clusters.yaml says, else what is up now.

    Returns:
        The shape, and a warning when less is up than clusters.yaml says.

    Raises:
        ClusterError: The cluster does not say.
    """
    now = _up_now(jobs)
    written = cluster.settings.nodes
    if written is None:
        return now, []
    cores = None if written.cores is None else written.cores * written.count
    total = written.gpus * written.count
    shape = Shape(written.count, written.gpus, total, cores, "clusters.yaml")
    if now.total_gpus < total or now.nodes < shape.nodes:
        return shape, [
            f"of {shape.words} (clusters.yaml), {now.words} {'is' if now.nodes == 1 else 'are'} "
            "up now"
        ]
    return shape, []


def _up_now(jobs: Jobs) -> Shape:
    # A rank takes a core beside its GPU.
    gpus = [(min(node.gpus, node.cores), node.cores) for node in jobs.nodes()]
    total = sum(count for count, _ in gpus)
    used = [both for both in gpus if both[0]] if total else [both for both in gpus if both[1]]
    each = min((count for count, _ in used), default=0)
    return Shape(len(used), each, total, sum(cores for _, cores in used), "the cluster")


def ranks_on(recipe: Recipe, shape: Shape) -> int:
    """Processes of a run: as the recipe says, one per GPU, or the fewest that fit on CPUs."""
    return run_ranks(recipe, shape.total_gpus)


def check_on(recipe: Recipe, cluster: Cluster, shape: Shape) -> list[str]:
    """Check everything about a recipe that can be known here.

    Args:
        recipe: A recipe whose structure is valid.
        cluster: Where it shall run.
        shape: What the cluster has.

    Returns:
        Warnings.

    Raises:
        RecipeError: All problems of the recipe.
    """
    ranks = ranks_on(recipe, shape)
    problems = [*_too_many(recipe, ranks, cluster, shape), *_relative(recipe)]
    fits = not problems
    # How many ranks a node holds decides nothing that could be wrong where they do not fit.
    local = min(ranks, shape.gpus or ranks)
    machine = Machine(shape.gpus if fits else 0, shape.cores or ranks, ranks, local)
    warnings: list[str] = []
    try:
        warnings += check_recipe(recipe, machine).warnings
    except RecipeError as error:
        known = {problem.path for problem in problems}
        for problem in error.problems:
            if problem.path in known:
                continue
            if _UNSEEN.match(problem.path) and not Path(cluster.settings.storage).is_dir():
                warnings.append(f"{problem.path}: {problem.value} cannot be checked from here")
            else:
                problems.append(problem)
    if problems:
        raise RecipeError(recipe.name, problems)
    return warnings


def _too_many(recipe: Recipe, ranks: int, cluster: Cluster, shape: Shape) -> Iterator[Problem]:
    most = shape.total_gpus or shape.cores
    if most is None or ranks <= most:
        return
    unit = "GPU" if shape.total_gpus else "CPU core"
    expected = f"at most {count(most, unit)}: cluster {cluster.name} has {shape.words}"
    expected += f", says {shape.said_by}"
    fixes = [f"ranks: {most} and smaller parallel degrees, or another cluster"] if most else []
    if shape.said_by != "clusters.yaml":
        fixes.append(f"for a cluster that grows, nodes: of {cluster.name} in clusters.yaml")
    yield Problem("ranks", str(ranks), expected, "; ".join(fixes))


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
