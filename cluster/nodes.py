"""Nodes: what a Ray cluster has to put ranks on."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

_KNOCK_S = 3.0
Device = Literal["gpu", "cpu"]
"""What a rank has for itself: a GPU with a core, or a core."""


@dataclass(frozen=True)
class Node:
    """One node that is alive.

    Attributes:
        id: Ray's, in hex digits.
        address: Its address inside of the cluster.
        gpus: That Ray may give away.
        cores: That Ray may give away.
        port: Where its raylet listens.
    """

    id: str
    address: str
    gpus: int
    cores: int
    port: int = 0

    @property
    def name(self) -> str:
        """For people and as a key: several nodes may share an address."""
        return f"{self.address} ({self.id[:8]})"

    def slots(self, gpu: bool) -> int:
        """Ranks that it takes: one for each GPU, or on CPUs for each core."""
        return min(self.gpus, self.cores) if gpu else self.cores


def free_slots(gpu: bool) -> dict[str, int]:
    """Ranks that nodes could take now, by id: others may work there as well."""
    from ray._private.state import available_resources_per_node

    found = available_resources_per_node()
    free = {id: (int(r.get("GPU", 0)), int(r.get("CPU", 0))) for id, r in found.items()}
    return {id: min(gpus, cores) if gpu else cores for id, (gpus, cores) in free.items()}


def has_gone(node: Node) -> bool:
    """Whether nothing listens any more where a node's raylet did: Ray itself takes longer."""
    try:
        with socket.create_connection((node.address, node.port), timeout=_KNOCK_S):
            return False
    except OSError:
        return True


def alive_nodes() -> tuple[Node, ...]:
    """The nodes of the cluster that this process is connected to, by address.

    Without those that are about to be taken away: Ray puts nothing on them any more.
    """
    import ray
    from ray._private.state import state

    leaving = state.get_draining_nodes()
    found = [
        Node(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            gpus=int(entry["Resources"].get("GPU", 0)),
            cores=int(entry["Resources"].get("CPU", 0)),
            port=int(entry["NodeManagerPort"]),
        )
        for entry in ray.nodes()
        if entry["Alive"] and entry["NodeID"] not in leaving
    ]
    return tuple(sorted(found, key=lambda node: (node.address, node.id)))
