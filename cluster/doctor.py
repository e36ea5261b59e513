"""Doctor: what this machine has for runs on clusters. It asks no cluster."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import LongspanError
from .clusters import Cluster, clusters_file, load_clusters
from .settings import ClusterSettings
from .token import read_token

_OLDEST = (2, 52)
"""Ray with tokens."""

Row = tuple[str, str, str]
"""Name, what was found, and a remark."""


def rows() -> Iterator[Row]:
    """Ray, py-spy, clusters.yaml, and for each cluster whether there is a token for it."""
    yield _ray()
    yield _py_spy()
    try:
        clusters = load_clusters()
    except LongspanError as error:
        yield "clusters", "broken", str(error).replace("\n", " ")
        return
    file = clusters_file()
    if not clusters:
        yield "clusters", "none", f"{file} would name them"
        # What `--cluster URL` would use.
        unnamed = ClusterSettings(address="http://127.0.0.1:8265", storage="/")
        yield _token("token", Cluster("http://127.0.0.1:8265", unnamed))
        return
    yield "clusters", ", ".join(clusters), str(file)
    for cluster in clusters.values():
        yield _token(f"token of {cluster.name}", cluster)


def _ray() -> Row:
    install = 'pip install "ray[default,train]"'
    try:
        found = version("ray")
    except PackageNotFoundError:
        return "ray", "missing", f"runs on a cluster: {install}"
    numbers = tuple(map(int, re.findall(r"[0-9]+", found)[:2]))
    if numbers < _OLDEST:
        return "ray", found, f"too old, as it knows no tokens: {install}"
    return "ray", found, "runs on a cluster"


def _py_spy() -> Row:
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.is_file() else shutil.which("py-spy")
    use = "shows where ranks hang"
    return (
        ("py-spy", "found", use) if found else ("py-spy", "missing", f"{use}: pip install py-spy")
    )


def _token(name: str, cluster: Cluster) -> Row:
    """Whether there is a token; never the token."""
    try:
        token = read_token(cluster)
    except LongspanError as error:
        return name, "broken", f"{error.what}; {error.fix}"
    if token.value is None:
        where = "name its file as `token` in clusters.yaml, or put it"
        return name, "none", f"{where} {token.source}; `ray get-auth-token` there shows it"
    return name, "found", f"from {token.source}"
