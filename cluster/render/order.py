"""Order: a checked recipe, and the nodes that it is to be rendered for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import RunError
from ...recipes.loading import load_recipe
from ...trainer.run_directory import refuse_credentials
from ..clusters import Cluster, clusters_file, find_cluster
from ..fit import fit
from ..placement import groups_of
from ..registry import check_id, new_id
from ..settings import ClusterSettings, check_absolute
from ..shape import Shape
from ..submission import resolved

_CORES_PER_GPU = 8


@dataclass(frozen=True)
class Wanted:
    """What a user asked for.

    Attributes:
        recipe: The name of a shipped recipe, or a file.
        changes: As of `--set`.
        cluster: A name in clusters.yaml; None: the only one there, unless there is a storage.
        storage: The folder that all nodes share; None: the cluster's.
        nodes: How many; None: as the cluster has, as far as they are needed.
        gpus: Of each node; None: the cluster's.
        cores: Of each node; None: the cluster's.
        run_id: Of the run; None: a new one.
    """

    recipe: str
    changes: Sequence[str] = ()
    cluster: str | None = None
    storage: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    cores: int | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Order:
    """What is rendered.

    Attributes:
        run_id: Of the run; applied twice it is one run.
        name: Of the recipe.
        text: The resolved recipe.
        ranks: Processes of the run.
        nodes: How many.
        gpus: Of each node.
        cores: Of each node; None where nobody said.
        storage: The folder that all nodes share.
        grace_s: Seconds that a run needs to save when it is asked to stop.
        secrets: Environment variables of the ranks, and the files on the nodes with their values.
        interface: The network interface between the nodes.
        warnings: What may not be wanted.
        groups: Ranks in a row that have to be on one node, by the setting of a stage that says so.
        most_nodes: There are so many.
    """

    run_id: str
    name: str
    text: str
    ranks: int
    nodes: int
    gpus: int
    cores: int | None
    storage: str
    grace_s: int
    secrets: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    warnings: Sequence[str] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    most_nodes: int = 1

    @property
    def run_dir(self) -> str:
        """The run's folder."""
        return f"{self.storage.rstrip('/')}/runs/{self.run_id}"

    @property
    def node_cores(self) -> int:
        """Cores that a node has to have."""
        return self.cores or _CORES_PER_GPU * self.gpus or 1


def take(wanted: Wanted) -> Order:
    """Check what is wanted as `longspan submit` does, as far as that goes without a cluster.

    Raises:
        RecipeError: What is wrong with the recipe on such nodes.
        ClusterError: No such cluster is known.
        RunError: The nodes are not known, the id is none, or the recipe holds a credential.
    """
    if wanted.run_id is not None:
        check_id(wanted.run_id)
    recipe = load_recipe(wanted.recipe, wanted.changes)
    refuse_credentials(recipe.run())
    cluster = _cluster(wanted)
    known = cluster.settings.nodes
    nodes, gpus = wanted.nodes, wanted.gpus
    cores = wanted.cores if wanted.cores is not None else (known.cores if known else None)
    if gpus is None and known is not None:
        gpus = known.gpus
    if nodes is None and known is not None:
        nodes = known.count
    if nodes is None or (gpus is None and cores is None):
        raise RunError(
            "the nodes are not known: how many, and with how many GPUs",
            f"add --nodes 2 --gpus 8 (or --cores for CPUs), or `nodes` of {cluster.name} "
            f"to {clusters_file()}",
        )
    gpus = gpus or 0
    shape = Shape.of(nodes, gpus, cores, "the nodes that were given")
    found = fit(recipe, cluster, shape)
    groups = groups_of(recipe, max(shape.slots or (found.ranks,)))
    return Order(
        run_id=wanted.run_id or new_id(recipe.name),
        name=recipe.name,
        text=resolved(recipe.run(), recipe.name),
        ranks=found.ranks,
        nodes=found.nodes or min(nodes, found.ranks),
        gpus=gpus,
        cores=cores,
        storage=cluster.settings.storage,
        grace_s=round(recipe.recovery.grace),
        secrets=cluster.settings.secrets,
        interface=cluster.settings.interface,
        warnings=found.warnings,
        groups={recipe.where(f"stages.{n}.parallel"): group for n, group in enumerate(groups)},
        most_nodes=nodes,
    )


def label(name: str, longest: int = 40) -> str:
    """A name as Kubernetes takes it: small letters, digits and single dashes."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain[:longest].strip("-") or "run"


def _cluster(wanted: Wanted) -> Cluster:
    if wanted.storage is None:
        return find_cluster(wanted.cluster)
    try:
        check_absolute(wanted.storage)
    except ValueError as error:
        fix = "give the folder as the nodes see it, such as /shared/longspan"
        raise RunError(f"--storage {wanted.storage} is not {error}", fix) from None
    if wanted.cluster is not None:
        listed = find_cluster(wanted.cluster)
        settings = listed.settings.model_copy(update={"storage": wanted.storage})
        return Cluster(listed.name, settings)
    # Nobody asks this address: what is rendered brings its own cluster.
    settings = ClusterSettings(address="http://127.0.0.1:8265", storage=wanted.storage)
    return Cluster("the cluster", settings)
