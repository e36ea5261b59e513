"""Groups: which nodes measure an all-reduce together, and who is to blame where it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..nodes import Node
from . import bandwidth
from .bandwidth import Group
from .crew import Crew
from .result import Result

_PORT_S = 5.0
_LIMIT_S = 18.0
_LEAST_S = 10.0
"""With less there is no telling a network that does not work from a node that is slow."""


def measure(crew: Crew, nodes: Sequence[Node], known: Sequence[Node] = ()) -> list[Result]:
    """What an all-reduce carries inside of nodes, and between those where that works.

    Args:
        crew: Asks the nodes.
        nodes: Those that are fit so far.
        known: Those that measured before and are only there for the others, which are judged.
    """
    gpu = any(node.gpus for node in (*known, *nodes))
    able = [node for node in nodes if node.gpus or not gpu]
    if crew.left(_LIMIT_S) < _LEAST_S:
        return [_unmeasured(node) for node in able]
    results: list[Result] = []
    judged = {node.name for node in able}
    ranks = {node.name: max(1, node.gpus) for node in (*known, *able)}
    if several := [node for node in able if node.gpus > 1]:
        answers = _run(crew, [[node] for node in several])
        results += bandwidth.judge("inside", answers, gpu, ranks)
    bad = {result.node for result in results if result.level == "fail"}
    present = {node.name for node in crew.present}
    able = [node for node in able if node.name in present - bad]
    if not able:
        return results
    able = [*(node for node in known if node.gpus or not gpu), *able]
    if len(able) > 1:
        answers = _between(crew, able, gpu)
        if answers:
            results += bandwidth.judge("between", answers, gpu, ranks)
        else:
            results += [_unmeasured(node) for node in able if node in crew.present]
    return [result for result in results if result.node in judged]


def _between(crew: Crew, nodes: Sequence[Node], gpu: bool) -> dict[str, Any]:
    """The speed or error of each node with the others; nothing where no time or one is left."""
    if crew.left(_LIMIT_S) < _LEAST_S:
        return {}
    answers = _run(crew, [nodes])
    there = [node for node in nodes if node in crew.present]
    if len(there) < len(nodes) and (_has_failed(answers) or not answers):
        # A node that went away took the others with it, who have done nothing.
        if len(there) < 2 or crew.left(_LIMIT_S) < _LEAST_S:
            return {}
        nodes, answers = there, _run(crew, [there])
    failed = _has_failed(answers)
    if failed and len(nodes) > 2 and crew.left(_LIMIT_S) >= _LEAST_S:
        # All wait for the one that does not come. Pairs tell which it is, unless all of them
        # come together; then everybody has the error.
        pairs = _run(crew, _pairs([node for node in nodes if node.name in answers]))
        return pairs if _has_failed(pairs) else answers
    if not failed and len(nodes) > 2 and _is_slow(answers, gpu):
        return _by_links(crew, nodes) or answers
    return answers


def _unmeasured(node: Node) -> Result:
    fix = "see what keeps the nodes busy, or has ended"
    found = "no time or no other node was left"
    return Result(node.name, "bandwidth", "warn", found, "a measurement", fix)


def _has_failed(answers: Mapping[str, Any]) -> bool:
    return any("error" in found for found in answers.values())


def _is_slow(answers: Mapping[str, Any], gpu: bool) -> bool:
    least = bandwidth.expected_rate("between", gpu)
    return any(found["bytes_per_s"] < least for found in answers.values())


def _by_links(crew: Crew, nodes: Sequence[Node]) -> dict[str, Any]:
    """Each node's speed with the better of its two neighbours; nothing where time runs out.

    All together are as slow as the slowest of them. Of two neighbours that are slow, the one that
    is fast with its other neighbour is not to blame.
    """
    links = [(node, nodes[(at + 1) % len(nodes)]) for at, node in enumerate(nodes)]
    even = len(links) // 2 * 2
    best: dict[str, Any] = {}
    # No node is in two links of a round.
    for part in filter(None, (links[:even:2], links[1:even:2], links[even:])):
        if crew.left(_LIMIT_S) < _LEAST_S:
            return {}
        for name, found in _run(crew, part).items():
            if "error" in found:  # they have just come together: this tells nothing
                return {}
            known = best.get(name, found)
            best[name] = max(known, found, key=lambda one: one["bytes_per_s"])
    return best


def _pairs(nodes: Sequence[Node]) -> list[Sequence[Node]]:
    """Neighbours; the last three together where the number is odd."""
    pairs = [nodes[at : at + 2] for at in range(0, len(nodes) - 1, 2)]
    if len(nodes) % 2 and pairs:
        pairs[-1] = nodes[-3:]
    return pairs


def _run(crew: Crew, groups: Sequence[Sequence[Node]]) -> dict[str, Any]:
    """Measure in all groups at the same time; a node's answer is a speed or an error."""
    ports = crew.ask("port", {group[0].name: () for group in groups if group}, crew.left(_PORT_S))
    limit_s = crew.left(_LIMIT_S)
    arguments = {}
    for group in groups:
        # Without the node where the ranks of a group meet there is none.
        if not group or group[0].name not in ports:
            continue
        first = 0
        world = sum(max(1, node.gpus) for node in group)
        address, port = ports[group[0].name]
        for node in group:
            local = max(1, node.gpus)
            place = Group(address, port, first, local, world)
            arguments[node.name] = (place, max(1.0, limit_s - 2))
            first += local
    return crew.ask("reduce", arguments, limit_s)
