"""Report: what preflight found on all nodes, which of them can be used, and why not the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...errors import RunError
from ...recipes.check import count
from ...redact import redact
from ...trainer.run_directory import write_atomically
from ..nodes import Node
from .result import Result

FILE = "preflight.json"
_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
_HOW_MANY = 12


@dataclass(frozen=True)
class Report:
    """What preflight found.

    Attributes:
        nodes: All that were looked at.
        results: By check, then by node.
        seconds: That it took.
        versions: That the nodes had to have.
    """

    nodes: Sequence[Node]
    results: Sequence[Result]
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)

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
            "seconds": round(self.seconds, 3),
            "versions": dict(self.versions),
            "nodes": [{**asdict(node), "name": node.name} for node in self.nodes],
            "healthy": [node.id for node in healthy(self)],
            "results": [asdict(result) for result in self.results],
        }

    def write(self, run_dir: Path) -> None:
        """Leave the report in the run's folder.

        Raises:
            RunError: It cannot be written there.
        """
        try:
            write_atomically(run_dir / FILE, json.dumps(redact(self.as_dict()), indent=2) + "\n")
        except OSError as error:
            raise RunError(
                f"{run_dir} cannot be written: {error.strerror or error}",
                "mend it, or give the run another folder",
            ) from error


def healthy(report: Report) -> tuple[Node, ...]:
    """The nodes that ranks can be put on."""
    return tuple(node for node in report.nodes if not report.failures(node))


def capacity(nodes: Sequence[Node]) -> int:
    """Ranks that nodes have room for: one per GPU, or on nodes without any one per core."""
    return sum(node.gpus for node in nodes) or sum(node.cores for node in nodes)


def require(report: Report, ranks: int) -> tuple[Node, ...]:
    """The healthy nodes, if they have room for a run.

    Args:
        report: Of all nodes.
        ranks: The fewest that the run can go on with.

    Raises:
        RunError: They have not; the message says of every node what it lacks.
    """
    good = healthy(report)
    # With GPUs anywhere, a node without any takes no rank.
    room = sum(node.gpus for node in good)
    if not any(node.gpus for node in report.nodes):
        room = capacity(good)
    if room >= ranks:
        return good
    lines = []
    for node in report.nodes:
        failures = report.failures(node)
        has = count(node.gpus, "GPU") if node.gpus else count(node.cores, "CPU core")
        lines.append(f"{node.name}: {'; '.join(map(str, failures)) or f'fit, {has}'}")
    shown = [*lines[:_HOW_MANY], *([f"and {len(lines) - _HOW_MANY} more"][: len(lines) > 12])]
    raise RunError(
        "\n  ".join(
            [
                f"the run needs room for {count(ranks, 'rank')}, and the nodes that are fit "
                f"({len(good)} of {len(report.nodes)}) have room for {room}:",
                *shown,
            ]
        ),
        f"mend the nodes that are named, add others, or lower ranks or ranks_at_least to {room}"
        if room
        else "mend the nodes that are named, or add others",
    )


def render(report: Report) -> RenderableType:
    """A table: a line per problem, and one per check for the nodes where all is well."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("node", "check", "", "found", "expected"):
        table.add_column(heading, overflow="fold")
    for check in dict.fromkeys(result.check for result in report.results):
        of_check = [result for result in report.results if result.check == check]
        good = [result for result in of_check if result.level == "ok"]
        if good:
            same = len({result.found for result in good}) == 1
            found = good[0].found + ("" if same else ", ...")
            where = good[0].node if len(good) == 1 else f"{len(good)} nodes"
            _add(table, where, Result(where, check, "ok", found, good[0].expected))
        for result in of_check:
            if result.level != "ok":
                _add(table, result.node, result)
    good, of = len(healthy(report)), len(report.nodes)
    table.title = f"preflight: {good} of {of} nodes are fit, in {report.seconds:.1f} s"
    table.title_justify, table.title_style = "left", "bold"
    return table


def _add(table: Table, node: str, result: Result) -> None:
    level = Text(result.level, style=_STYLES[result.level])
    table.add_row(Text(node), result.check, level, Text(result.found), Text(result.expected))
    if result.fix:
        table.add_row("", "", "", Text(f"fix: {result.fix}"), "")
