"""Placement: where the ranks of a gang go, groups that talk much inside of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..trainer.settings import RunSettings


def unit_of(run: RunSettings, most: int) -> int:
    """Ranks in a row that have to be on one node.

    All of a tensor x context group, unless no node has room for one: then those of a tensor group.

    Args:
        run: The run's settings.
        most: Ranks that the largest node takes.
    """
    return math.lcm(*groups_of(run, most))


def groups_of(run: RunSettings, most: int) -> list[int]:
    """As `unit_of`, of each stage by itself."""
    parallel = [stage.parallel for stage in run.stages]
    whole = [p.tensor * p.context for p in parallel]
    return whole if math.lcm(*whole) <= most else [p.tensor for p in parallel]


def group_of(run: RunSettings, unit: int) -> str:
    """What `unit` ranks in a row are: a tensor x context group, or a tensor group only."""
    return "tensor x context group" if unit == _whole(run) else "tensor group"


def split_groups(run: RunSettings, unit: int) -> str:
    """What it means that only `unit` ranks stay together; empty where groups are not split."""
    whole = _whole(run)
    if unit == whole:
        return ""
    return (
        f"no node has room for a tensor x context group of {whole} ranks: it is split over nodes, "
        f"and what its ranks exchange goes over the network; {unit} (tensor) stay on one node"
    )


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


def misplaced(nodes: Sequence[str], unit: int, group: str = "tensor x context group") -> str:
    """What is wrong with the order of ranks over nodes; empty if nothing is.

    Args:
        nodes: The node of each rank.
        unit: Ranks in a row that have to be on one node.
        group: What they are, for the text.
    """
    for first in range(0, len(nodes), unit):
        if len(set(nodes[first : first + unit])) > 1:
            last = min(first + unit, len(nodes)) - 1
            return f"ranks {first} to {last}, a {group}, are on several nodes"
    left: set[str] = set()
    for rank, (before, node) in enumerate(pairwise(nodes), 1):
        left |= {before} if before != node else set()
        if node in left:
            return (
                f"ranks {nodes.index(node)} and {rank} are on node {node[:8]}, and ranks between "
                "them are on others"
            )
    return ""


def _whole(run: RunSettings) -> int:
    """Ranks of a tensor x context group, of all stages."""
    return math.lcm(*(stage.parallel.tensor * stage.parallel.context for stage in run.stages))
