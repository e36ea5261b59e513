"""Preflight: looks at all nodes at once, from inside of each, before any rank starts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...trainer.observe.events import EventLog
from ...trainer.parameters import likely_vocabulary
from ...trainer.settings import RunSettings
from ..nodes import Node
from . import clock, dashboard, devices, disk, groups, network, storage, versions
from .crew import Crew
from .report import Report, healthy
from .result import Result

LIMIT_S = 60.0
_LOOK_S = 30.0
_GREET_S = 8.0
_MEET_S = 14.0
_LAST_S = 6.0
"""That are left for the dashboard and for cleaning up."""


def preflight(
    nodes: Sequence[Node],
    run: RunSettings,
    run_dir: Path,
    *,
    beside: Sequence[Node] = (),
    interface: str | None = None,
    address: str | None = None,
    log: EventLog | None = None,
    like: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> Report:
    """Check every node that ranks may be put on; call in a driver that is connected to Ray.

    Args:
        nodes: Those that nobody has looked at.
        run: What shall run; already checked.
        run_dir: The run's folder, on storage that all nodes share.
        beside: Nodes that are known to be fit and are idle. The others have to reach them, see
            their files and measure with them; they themselves are not judged again.
        interface: The network interface between the nodes, as NCCL takes it; None: any.
        address: Of the dashboard; None: as Ray says.
        log: Gets a `preflight` event.
        like: The versions of nodes that are in use already (`Report.versions`), which those that
            come later must have; None: what most of these have.
        limit_s: A node that has not answered by then fails.

    Returns:
        The report, which is in `run_dir` as well.

    Raises:
        RunError: The report cannot be written there.
    """
    began, folder = time.monotonic(), run_dir / f".preflight-{os.urandom(4).hex()}"
    # Known ones first: where two do not reach each other, the later one is to blame.
    with Crew([*beside, *nodes], interface, began + limit_s - _LAST_S) as crew:
        try:
            looked = _look(crew, nodes, run, run_dir, folder)
            expected = like or versions.reference(_part(looked, "versions"), versions.probe())
            results = _alone(crew, run, looked, expected)
            results += _meet(crew, _greeted(crew, beside, folder) | looked, folder, interface)
            bad = {result.node for result in results if result.level == "fail"}
            fit = [node for node in crew.present if node.name not in bad]
            known = [node for node in fit if node in beside]
            results += groups.measure(crew, [node for node in fit if node not in known], known)
            results = [*crew.silent(), *results]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    judged = {node.name for node in nodes}
    results = [result for result in results if result.node in judged]
    if (address := address or dashboard.where()) is not None:
        results.append(dashboard.judge(dashboard.probe(address)))
    report = Report(nodes, results, time.monotonic() - began, expected)
    report.write(run_dir)
    if log is not None:
        _log(report, log)
    return report


def _log(report: Report, log: EventLog) -> None:
    problems = [f"{r.level}: {r.node}: {r}" for r in report.problems]
    names = [node.name for node in healthy(report)]
    seconds = round(report.seconds, 3)
    nodes = len(report.nodes)
    log.write("preflight", nodes=nodes, healthy=names, problems=problems, seconds=seconds)


def _alone(
    crew: Crew,
    run: RunSettings,
    looked: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, str],
) -> list[Result]:
    """What can be said of each node without the others."""
    results = list(versions.judge(_part(looked, "versions"), expected))
    results += versions.judge_tracking(_part(looked, "versions"), run.tracking)
    gpus = {node.name: node.gpus for node in crew.nodes}
    results += devices.judge(_part(looked, "devices"), gpus)
    results += clock.judge({name: clock.Skew(*part["clock"]) for name, part in looked.items()})
    one = disk.checkpoint_bytes(run, likely_vocabulary(run))
    results += disk.judge(_part(looked, "disk"), one, run.checkpoint.keep)
    return results


def _look(
    crew: Crew, nodes: Sequence[Node], run: RunSettings, run_dir: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    limit_s = crew.left(_LOOK_S)
    arguments = (folder, disk.places(run, run_dir), crew.ask_time, max(1.0, limit_s - 3))
    return crew.ask("look", {node.name: arguments for node in nodes}, limit_s)


def _greeted(crew: Crew, beside: Sequence[Node], folder: Path) -> dict[str, dict[str, Any]]:
    """What known nodes have to do before others can meet them."""
    return crew.ask("greet", {node.name: (folder,) for node in beside}, crew.left(_GREET_S))


def _meet(
    crew: Crew, looked: Mapping[str, Mapping[str, Any]], folder: Path, interface: str | None
) -> list[Result]:
    """Whether nodes reach each other and see each other's files."""
    open_, results = {}, []
    for name, part in _part(looked, "network").items():
        if error := part.get("error"):
            fix = "name an interface that every node has: `interface` of the cluster"
            wanted = "an address for the others"
            results.append(Result(name, network.CHECK, "fail", error, wanted, fix))
        else:
            open_[name] = (part["address"], part["port"])
    writes = _part(looked, "storage")
    written = {name: name for name, part in writes.items() if "error" not in part}
    names = list(open_)
    peers = {
        name: {other: open_[other] for other in network.neighbours(names, name)} for name in names
    }
    arguments = {name: (peers.get(name, {}), folder, written) for name in looked}
    met = crew.ask("meet", arguments, crew.left(_MEET_S))
    # Nobody is held to see the file of a node that went away meanwhile.
    written = {name: text for name, text in written.items() if name in met}
    seen = {name: part for name, part in _part(met, "storage").items() if name in written}
    seen[storage.DRIVER] = storage.read(folder, written)
    reached = {name: part for name, part in _part(met, "network").items() if name in open_}
    results += network.judge(reached, interface)
    return [*results, *storage.judge(folder.parent, {n: writes[n] for n in met}, seen)]


def _part(looked: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    return {node: part[name] for node, part in looked.items()}
