"""Clusters: those that a user has named in clusters.yaml, or one by its address."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ClusterError, ClustersFileError, Problem, RecipeError
from ..recipes.document import describe, read_document
from ..recipes.recipe import NAME
from ..recipes.translate import nearest, translate
from .settings import ClusterSettings, check_absolute, check_address

_MINIMAL = """
    clusters:
      lab:
        address: http://127.0.0.1:8265    # of its dashboard, here through an SSH tunnel
        storage: /shared/longspan         # a folder that all nodes see"""


@dataclass(frozen=True)
class Cluster:
    """A cluster with its name.

    Attributes:
        name: As in clusters.yaml; the address of one that is not in it.
        settings: Where it is and what it has.
    """

    name: str
    settings: ClusterSettings

    @property
    def listed(self) -> bool:
        """Whether it has a name of its own."""
        return "://" not in self.name


def clusters_file() -> Path:
    """$LONGSPAN_CLUSTERS, else $XDG_CONFIG_HOME/longspan/clusters.yaml, else in ~/.config."""
    if own := os.environ.get("LONGSPAN_CLUSTERS"):
        return Path(own).expanduser()
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "longspan" / "clusters.yaml"


def load_clusters() -> dict[str, Cluster]:
    """The clusters of clusters.yaml by name; none when there is no such file.

    Raises:
        ClustersFileError: Everything that is wrong with the file.
    """
    file = clusters_file()
    if not file.exists():
        return {}
    try:
        written = read_document(file)
    except RecipeError as error:
        raise ClustersFileError(str(file), [*map(_about_clusters, error.problems)]) from None
    found, problems = written.get("clusters"), []
    for key in written:
        if key != "clusters":
            fix = nearest(str(key), ["clusters"])
            problems.append(Problem(str(key), "an unknown key", "clusters", fix))
    if not isinstance(found, dict) or not found:
        got = describe(found) if "clusters" in written else "nothing"
        problems.append(Problem("clusters", got, "clusters with their names", f"write{_MINIMAL}"))
        found = {}
    clusters = {}
    for name, raw in found.items():
        cluster, more = _read(str(name), raw)
        problems += more
        if cluster is not None:
            clusters[cluster.name] = cluster
    if problems:
        raise ClustersFileError(str(file), problems)
    return clusters


def find_cluster(wanted: str | None, storage: str | None = None) -> Cluster:
    """The cluster that a user means.

    Args:
        wanted: A name of clusters.yaml or the address of a dashboard; None: the only one there is.
        storage: The storage folder of a cluster that is given by its address.

    Raises:
        ClusterError: There is none of this name, or no or no single one to take by itself.
        ClustersFileError: clusters.yaml is wrong.
    """
    if wanted is not None and "://" in wanted:
        return _by_address(wanted, storage)
    if storage is not None:
        raise ClusterError(
            f"--storage {storage} belongs to a cluster that is given by its address",
            f"leave it out: the storage of a named cluster is in {clusters_file()}",
        )
    clusters = load_clusters()
    names = ", ".join(clusters)
    if not clusters:
        what = f"no cluster is named `{wanted}`" if wanted else "no cluster is known"
        raise ClusterError(
            f"{what}: {clusters_file()} does not exist",
            f"write it:{_MINIMAL}\n  or give the address: "
            "--cluster http://127.0.0.1:8265 --storage /shared/longspan",
        )
    if wanted is None:
        if len(clusters) == 1:
            return next(iter(clusters.values()))
        fix = f"say which: --cluster {next(iter(clusters))}"
        raise ClusterError(f"{clusters_file()} has {len(clusters)} clusters: {names}", fix)
    if wanted not in clusters:
        close = nearest(wanted, list(clusters))
        raise ClusterError(
            f"no cluster is named `{wanted}`; {clusters_file()} has {names}",
            close or f"take one of them, or add {wanted} to the file",
        )
    return clusters[wanted]


def known_cluster(name: str, address: str, storage: str) -> Cluster:
    """The cluster that a run was submitted to, as clusters.yaml has it now, else as it was.

    Args:
        name: Its name at that time.
        address: Its address at that time.
        storage: Its storage at that time.

    Raises:
        ClustersFileError: clusters.yaml is wrong.
    """
    was = Cluster(name, ClusterSettings(address=address, storage=storage))
    return load_clusters().get(name, was)


def _by_address(address: str, storage: str | None) -> Cluster:
    try:
        address = check_address(address)
    except ValueError as error:
        fix = f"--cluster http://HOST:8265, or a name from {clusters_file()}"
        raise ClusterError(f"--cluster {address} is not {error}", fix) from None
    # What its owner wrote about it (token, secrets, interface) holds for it under any name.
    same = (c for c in load_clusters().values() if c.settings.address == address)
    listed = next(same, None)
    if storage is None and listed is not None:
        return listed
    if storage is None:
        raise ClusterError(
            f"--cluster {address} does not say where runs are kept",
            "add --storage DIR, a folder that all nodes see under the same path",
        )
    try:
        check_absolute(storage)
    except ValueError as error:
        fix = "give the folder as the nodes see it, such as /shared/longspan"
        raise ClusterError(f"--storage {storage} is not {error}", fix) from None
    if listed is not None:
        settings = listed.settings.model_copy(update={"storage": storage})
        return replace(listed, settings=settings)
    return Cluster(address, ClusterSettings(address=address, storage=storage))


def _read(name: str, raw: Any) -> tuple[Cluster | None, list[Problem]]:
    place = f"clusters.{name}"
    if not re.fullmatch(NAME, name):
        return None, [Problem(place, name, "a name of letters, digits, -, _ and .")]
    if not isinstance(raw, dict):
        return None, [Problem(place, describe(raw), "a block of settings", f"write{_MINIMAL}")]
    try:
        return Cluster(name, ClusterSettings.model_validate(raw)), []
    except ValidationError as error:
        found = translate(error, ClusterSettings, raw)
        return None, [replace(problem, path=f"{place}.{problem.path}") for problem in found]


def _about_clusters(problem: Problem) -> Problem:
    """A problem with a document, without the advice about recipes."""
    about_recipes = "longspan recipes" in problem.fix
    return replace(problem, fix=f"write{_MINIMAL}") if about_recipes else problem
