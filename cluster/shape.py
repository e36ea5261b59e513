"""Shape: the nodes that a cluster can give to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..recipes.check import count
from .clusters import Cluster
from .jobs import Jobs, Node
from .nodes import Device
from .placement import place


@dataclass(frozen=True)
class Shape:
    """What a cluster has.

    Attributes:
        nodes: How many; those with GPUs where there are any.
        slots: Ranks that each of them takes: one for each GPU, or without GPUs for each core;
            None where nobody says.
        gpu: Whether they have GPUs.
        said_by: Who says so, for messages.
        gpu_names: Of the GPUs, as far as anybody says; several where nodes differ.
    """

    nodes: int
    slots: tuple[int, ...] | None
    gpu: bool
    said_by: str
    gpu_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, nodes: int, gpus: int, cores: int | None, said_by: str) -> Shape:
        """Equal nodes; a rank takes a core beside its GPU."""
        each = min(gpus, cores or gpus) if gpus else cores
        return cls(nodes, None if each is None else (each,) * nodes, gpus > 0, said_by)

    @property
    def gpus(self) -> int:
        """GPUs over all nodes."""
        return sum(self.slots or ()) if self.gpu else 0

    @property
    def kind(self) -> Device:
        """What a rank has for itself, for the driver."""
        return "gpu" if self.gpu else "cpu"

    @property
    def device(self) -> str:
        """What a rank has for itself, for people."""
        return "GPU" if self.gpu else "CPU core"

    @property
    def words(self) -> str:
        """`2 nodes with 8 GPUs each`."""
        nodes = count(self.nodes, "node")
        if not self.slots:
            return nodes
        if len(set(self.slots)) > 1:
            return f"{nodes} with {', '.join(map(str, self.slots))} {self.device}s"
        each = " each" if self.nodes > 1 else ""
        return f"{nodes} with {count(self.slots[0], self.device)}{each}"

    def most(self, unit: int) -> int | None:
        """Ranks that have room when `unit` of them in a row are not split over nodes."""
        return None if self.slots is None else sum(free // unit * unit for free in self.slots)

    def nodes_for(self, ranks: int, unit: int) -> int:
        """The nodes that so many ranks are put on; 0 where that is not known."""
        slots = {str(number): free for number, free in enumerate(self.slots or ())}
        return len(set(place(slots, ranks, unit) or ()))


def shape_of(cluster: Cluster, jobs: Jobs) -> tuple[Shape, list[str]]:
    """What a cluster can give: as clusters.yaml says, else what is up now.

    Returns:
        The shape, and a warning when less is up than clusters.yaml says.

    Raises:
        ClusterError: The cluster does not say.
    """
    now = _up_now(jobs.nodes())
    written = cluster.settings.nodes
    if written is None:
        return now, []
    shape = Shape.of(written.count, written.gpus, written.cores, "clusters.yaml")
    named = now.gpu_names if written.gpu_name is None else (written.gpu_name,)
    shape = replace(shape, gpu_names=named if shape.gpu else ())
    if now.nodes < shape.nodes or now.gpus < shape.gpus:
        verb = "is" if now.nodes == 1 else "are"
        return shape, [f"of {shape.words} (clusters.yaml), {now.words} {verb} up now"]
    return shape, []


def _up_now(nodes: Sequence[Node]) -> Shape:
    # A rank takes a core beside its GPU.
    gpus = sorted((min(node.gpus, node.cores) for node in nodes), reverse=True)
    cores = sorted((node.cores for node in nodes), reverse=True)
    gpu = any(gpus)
    slots = tuple(free for free in (gpus if gpu else cores) if free)
    names = sorted({node.gpu_name for node in nodes if node.gpus})
    return Shape(len(slots), slots, gpu, "the cluster", tuple(names))
