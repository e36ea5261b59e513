"""Nodes: what a Ray cluster has to put ranks on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One node that is alive.

    Attributes:
        id: Ray's, in hex digits.
        address: Its address inside of the cluster.
        gpus: That Ray may give away.
        cores: That Ray may give away.
    """

    id: str
    address: str
    gpus: int
    cores: int

    @property
    def name(self) -> str:
        """For people and as a key: several nodes may share an address."""
        return f"{self.address} ({self.id[:8]})"


def alive_nodes() -> tuple[Node, ...]:
    """The nodes of the cluster that this process is connected to, by address."""
    import ray

    found = [
        Node(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            gpus=int(entry["Resources"].get("GPU", 0)),
            cores=int(entry["Resources"].get("CPU", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return tuple(sorted(found, key=lambda node: (node.address, node.id)))
