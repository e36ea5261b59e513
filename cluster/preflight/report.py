"""Report: what preflight found on all nodes, which of them can be used, and why not the others."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import RunError
from ...redact import redact
from ...trainer.run_directory import write_atomically
from ..nodes import Node
from .result import Result

FILE = "preflight.json"


@dataclass(frozen=True)
class Report:
    """What preflight found.

    Attributes:
        nodes: All that were looked at.
        results: By check, then by node.
        seconds: That it took.
        versions: That the nodes had to have.
        time: When it ended, in unix seconds.
    """

    nodes: Sequence[Node]
    results: Sequence[Result]
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def failures(self, node: Node) -> list[Result]:
        """Why a node cannot be used."""
        return [r for r in self.results if r.node == node.name and r.level == "fail"]

    @property
    def problems(self) -> list[Result]:
        """All that is not as it should be."""
        return [result for result in self.results if result.level != "ok"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "time": round(self.time, 3),
            "seconds": round(self.seconds, 3),
            "versions": dict(self.versions),
            "nodes": [{**asdict(node), "name": node.name} for node in self.nodes],
            "healthy": [node.id for node in healthy(self)],
            "results": [asdict(result) for result in self.results],
        }

    def write(self, run_dir: Path) -> None:
        """Leave the report in the run's folder, after those of earlier looks.

        Raises:
            RunError: It cannot be written there.
        """
        file = run_dir / FILE
        looks = [*_looks(file), redact(self.as_dict())]
        try:
            write_atomically(file, json.dumps({"looks": looks}, indent=2) + "\n")
        except OSError as error:
            raise RunError(
                f"{run_dir} cannot be written: {error.strerror or error}",
                "mend it, or give the run another folder",
            ) from error


def healthy(report: Report) -> tuple[Node, ...]:
    """The nodes that ranks can be put on."""
    return tuple(node for node in report.nodes if not report.failures(node))


def _looks(file: Path) -> list[Any]:
    """What earlier looks found; nothing where that cannot be read."""
    try:
        return list(json.loads(file.read_text("utf-8"))["looks"])
    except (OSError, ValueError, TypeError, KeyError):
        return []
