"""Nodes of a cluster: which are there, what they can take, and where the ranks of a gang go."""

from __future__ import annotations

import math
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..trainer.settings import RunSettings

_KNOCK_S = 3.0


@dataclass(frozen=True)
class Node:
    """A machine that Ray knows.

    Attributes:
        id: Ray's number of it, new at every start of Ray there.
        name: For people: host name or address.
        address: Where its raylet listens.
        port: Of the raylet.
        cores: CPUs that Ray may give away there.
        gpus: GPUs that it may give away.
    """

    id: str
    name: str
    address: str
    port: int
    cores: int
    gpus: int

    def slots(self, gpu: bool) -> int:
        """Ranks that it takes: one for each GPU, or on CPUs for each core."""
        return min(self.gpus, self.cores) if gpu else self.cores

    def __str__(self) -> str:
        return f"{self.name} ({self.id[:12]})"


def nodes_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Node]:
    """The nodes that are alive, by id.

    Args:
        found: What `ray.nodes()` says.
    """
    alive = [raw for raw in found if raw["Alive"]]
    return {raw["NodeID"]: _node(raw) for raw in alive}


def _node(raw: Mapping[str, Any]) -> Node:
    resources = raw.get("Resources", {})
    return Node(
        id=raw["NodeID"],
        name=raw.get("NodeManagerHostname") or raw["NodeManagerAddress"],
        address=raw["NodeManagerAddress"],
        port=int(raw["NodeManagerPort"]),
        cores=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
    )


def has_gone(node: Node) -> bool:
    """Whether nothing listens any more where a node's raylet did: Ray itself takes longer."""
    try:
        with socket.create_connection((node.address, node.port), timeout=_KNOCK_S):
            return False
    except OSError:
        return True


def unit_of(run: RunSettings, most: int) -> int:
    """Ranks in a row that have to be on one node.

    All of a tensor x context group, unless no node has room for one: then those of a tensor group.

    Args:
        run: The run's settings.
        most: Ranks that the largest node takes.
    """
    parallel = [stage.parallel for stage in run.stages]
    whole = math.lcm(*(p.tensor * p.context for p in parallel))
    return whole if whole <= most else math.lcm(*(p.tensor for p in parallel))


def place(slots: Mapping[str, int], ranks: int, unit: int) -> tuple[str, ...] | None:
    """The node of every rank, on as few nodes as can be; None where there is no room.

    Args:
        slots: Ranks that each node takes.
        ranks: To place; a multiple of `unit`.
        unit: Ranks in a row that have to be on one node.
    """
    places: list[str] = []
    for node, free in sorted(slots.items(), key=lambda item: (-item[1], item[0])):
        here = min(free // unit * unit, ranks - len(places))
        places += [node] * here
    return tuple(places) if len(places) == ranks else None


def misplaced(nodes: Sequence[str], unit: int) -> str:
    """What is wrong with the order of ranks over nodes; empty if nothing is.

    Args:
        nodes: The node of each rank.
        unit: Ranks in a row that have to be on one node.
    """
    for first in range(0, len(nodes), unit):
        if len(set(nodes[first : first + unit])) > 1:
            last = first + unit - 1
            return f"ranks {first} to {last}, a tensor x context group, are on several nodes"
    return ""


def others(slots: Mapping[str, int], excluded: Collection[str]) -> dict[str, int]:
    """The slots of nodes that are not excluded and have any."""
    return {node: free for node, free in slots.items() if free and node not in excluded}
