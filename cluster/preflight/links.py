"""Links: which nodes are to blame when some pairs cannot reach each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def cut_off(
    broken: Mapping[str, Collection[str]], keep: Collection[str] = ()
) -> dict[str, list[str]]:
    """The fewest nodes, roughly, without which no link is broken.

    One node that nobody reaches breaks a link of everybody; it goes, the others stay.

    Args:
        broken: For each node those that it does not reach.
        keep: Those that never go.

    Returns:
        The nodes to leave out, each with the others that it was cut off from.
    """
    links = {frozenset((a, b)) for a, others in broken.items() for b in others if a != b}
    found: dict[str, list[str]] = {}
    # Of two that cannot reach each other, the later one goes: the order is that of the nodes.
    order = list(dict.fromkeys([*broken, *(name for link in links for name in sorted(link))]))
    while links:
        counts = {name: sum(name in link for link in links) for name in order if name not in keep}
        worst = max(counts, key=lambda name: (counts[name], order.index(name)), default=None)
        if worst is None or not counts[worst]:
            break
        gone = {link for link in links if worst in link}
        found[worst] = sorted(name for link in gone for name in link if name != worst)
        links -= gone
    return found
