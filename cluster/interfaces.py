"""Interfaces: which one of a node's networks ranks use, as NCCL's patterns say."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from ..trainer.loopback import GLOO_INTERFACE


class Interface(NamedTuple):
    """An interface of this node.

    Attributes:
        name: In full, as gloo wants it; None where no interface has the node's address.
        address: Its IPv4 address; of several the node's own.
    """

    name: str | None
    address: str


def find_interface(wanted: str | None, address: str) -> Interface:
    """The one interface of this node that ranks listen on.

    Of several that a pattern allows, the one with the node's own address: there the nodes know
    each other already. NCCL is given the pattern and may use all of them.

    Args:
        wanted: As NCCL takes it: beginnings of names with commas between them, `=` before whole
            names, `^` before those to avoid; None: any.
        address: The node's own.

    Raises:
        OSError: There is no such interface; the text names those that there are.
    """
    import psutil

    entries = psutil.net_if_addrs()
    found: dict[str, str] = {}
    for name in sorted(entries):
        of_one = [entry.address for entry in entries[name] if entry.family == socket.AF_INET]
        if of_one:
            found[name] = address if address in of_one else of_one[0]
    if wanted is None:
        return Interface(next((n for n, own in found.items() if own == address), None), address)
    listed = [part.partition(":")[0] for part in wanted.lstrip("^=").split(",")]

    def order(name: str) -> tuple[bool, bool, bool]:
        return name not in listed, found[name] != address, found[name].startswith("127.")

    allowed = [name for name in found if _allows(wanted, listed, name)]
    if not allowed:
        names = ", ".join(entries)
        raise OSError(f"no interface {wanted} with an IPv4 address; there is {names}")
    name = min(allowed, key=order)
    return Interface(name, found[name])


def variables(wanted: str | None, found: Interface) -> dict[str, str]:
    """What tells ranks where to listen: NCCL takes a pattern, gloo the name of one interface.

    Args:
        wanted: See `find_interface`; None: NCCL chooses, and what this node's own environment says
            about gloo stays.
        found: What it stands for here.
    """
    named = {} if wanted is None else {"NCCL_SOCKET_IFNAME": wanted}
    if found.name is not None and not (wanted is None and GLOO_INTERFACE in os.environ):
        named[GLOO_INTERFACE] = found.name
    return named


def _allows(wanted: str, listed: list[str], name: str) -> bool:
    whole = wanted.removeprefix("^").startswith("=")
    named = any(name == part if whole else name.startswith(part) for part in listed if part)
    return named != wanted.startswith("^")
