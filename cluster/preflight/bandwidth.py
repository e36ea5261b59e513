"""Bandwidth: what an all-reduce carries inside of nodes and between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...parallel.auto import CPU, GPU
from .child import ChildError, run_children
from .result import FAIL_SHARE, Result, median_of_alike, rate

Where = Literal["inside", "between"]
_SHARES = {True: 0.5, False: 0.1}
"""Of what exchanges are chosen by, for GPUs and for CPUs: less is worth a warning."""


@dataclass(frozen=True)
class Group:
    """The ranks that measure together.

    Attributes:
        address: Where the first rank listens.
        port: On which port.
        first: The number of the node's first rank.
        local: Ranks of the node.
        world: Ranks of all nodes.
    """

    address: str
    port: int
    first: int
    local: int
    world: int

    def environments(self, more: Mapping[str, str]) -> list[dict[str, str]]:
        """What each rank of the node sees."""
        return [
            {
                "MASTER_ADDR": self.address,
                "MASTER_PORT": str(self.port),
                "RANK": str(self.first + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(self.world),
                "OMP_NUM_THREADS": "1",
                **more,
            }
            for local in range(self.local)
        ]


def probe(group: Group, more: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    """Run this node's ranks of a group.

    Args:
        group: The ranks.
        more: Environment variables for them.
        limit_s: Seconds until all are ended.

    Returns:
        `bytes_per_s`, or `error`.
    """
    try:
        found = run_children("ring", group.environments(more), limit_s)
    except ChildError as error:
        return {"error": str(error)}
    return {"bytes_per_s": min(part["bytes_per_s"] for part in found)}


def expected_rate(where: Where, gpu: bool) -> float:
    """Bytes per second below which there is a warning."""
    wires = GPU if gpu else CPU
    return _SHARES[gpu] * (wires.inside if where == "inside" else wires.outside)


def judge(
    where: Where,
    nodes: Mapping[str, Mapping[str, Any]],
    gpu: bool,
    ranks: Mapping[str, int] | None = None,
) -> Iterator[Result]:
    """One result per node: slow is a warning, no group at all or much slower than others a failure.

    Args:
        where: What was measured.
        nodes: What `probe` returned on each.
        gpu: Whether the ranks have GPUs.
        ranks: Of each node; those with equally many are compared. None: of all equally many.
    """
    least = expected_rate(where, gpu)
    check, expected = f"bandwidth {where}", f"{rate(least)} or more"
    speeds = {node: f["bytes_per_s"] for node, f in nodes.items() if "bytes_per_s" in f}
    typical = median_of_alike(speeds, ranks or dict.fromkeys(speeds, 1))
    for node, found in nodes.items():
        if error := found.get("error"):
            fix = "see that NCCL's ports are open and `interface` of the cluster is right"
            if where == "inside":
                fix = "see nvidia-smi topo -m, and that /dev/shm is large enough"
            yield Result(node, check, "fail", str(error), "an all-reduce that works", fix)
            continue
        speed = found["bytes_per_s"]
        if speed >= least:
            yield Result(node, check, "ok", rate(speed), expected)
            continue
        fix = "see that the fast network is used: `interface` of the cluster, NCCL_DEBUG=INFO"
        if where == "inside":
            fix = "see nvidia-smi topo -m: the GPUs may lack NVLink or peer access"
        slow = speed < FAIL_SHARE * typical[node]
        others = f", or as others with {rate(typical[node])}" if slow else ""
        yield Result(node, check, "fail" if slow else "warn", rate(speed), expected + others, fix)
