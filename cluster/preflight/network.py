"""Network: every node opens a connection to the others, over the interface that ranks will use."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from .links import cut_off
from .result import Result

CHECK = "network"
_MOST = 32
"""Neighbours that one node connects to; in a ring of all nodes, so that each is tried."""

_EXPECTED = "a connection to every other node"
_LIMIT_S = 3.0


class Listener:
    """A port on one address of this node that accepts connections and closes them.

    Args:
        address: Of this node; nothing else is bound.

    Raises:
        OSError: This machine does not have the address.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        # A thread in accept() keeps a closed socket open; shutdown wakes it.
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        finally:
            self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:
                return


def address_of(interface: str | None, address: str) -> str:
    """The address that this node has on an interface.

    Args:
        interface: As NCCL and gloo take it; None, or a pattern: the node's own address.
        address: The node's own.

    Raises:
        OSError: There is no such interface; the text names those that there are.
    """
    if interface is None or not re.fullmatch(r"[A-Za-z0-9_.-]+", interface):
        return address
    import psutil

    found = psutil.net_if_addrs()
    name = interface if interface in found else None
    name = name or next((name for name in sorted(found) if name.startswith(interface)), None)
    for entry in found.get(name or "", ()):
        if entry.family == socket.AF_INET:
            return entry.address
    raise OSError(f"no interface {interface} with an IPv4 address; there is {', '.join(found)}")


def free_port(address: str) -> int:
    """A port of an address that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def neighbours(names: Sequence[str], name: str) -> list[str]:
    """Those that a node connects to: the next ones in a ring of all."""
    at = names.index(name)
    ring = [*names[at + 1 :], *names[:at]]
    return ring[:_MOST]


def reach(peers: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Connect to others at once.

    Returns:
        Those that were not reached, and why.
    """
    with ThreadPoolExecutor(max_workers=_MOST) as pool:
        errors = dict(zip(peers, pool.map(_connect, peers.values()), strict=True))
    return {name: error for name, error in errors.items() if error}


def judge(failed: Mapping[str, Mapping[str, str]], interface: str | None) -> Iterator[Result]:
    """One result per node.

    Args:
        failed: What `reach` returned on each.
        interface: As the cluster's settings name it.
    """
    apart = cut_off({node: list(errors) for node, errors in failed.items()})
    for node, errors in failed.items():
        others = apart.get(node)
        if not others:
            yield Result(node, CHECK, "ok", _EXPECTED, _EXPECTED)
            continue
        why = next((errors[other] for other in others if other in errors), "")
        why = why or next(failed[o][node] for o in others if node in failed.get(o, {}))
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        fix = "let the nodes reach each other on all ports"
        if interface is None:
            fix += ", or name the interface between them: `interface` of the cluster"
        yield Result(node, CHECK, "fail", f"none with {shown} ({why})", _EXPECTED, fix)


def _connect(peer: tuple[str, int]) -> str:
    try:
        socket.create_connection(peer, timeout=_LIMIT_S).close()
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
    return ""
