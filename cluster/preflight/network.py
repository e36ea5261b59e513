"""Network: every node opens a connection to the others, over the interface that ranks will use."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

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


def free_port(*addresses: str) -> int:
    """A port that nobody listens on right now at any of some addresses of this node."""
    while True:
        with ExitStack() as held:
            port = 0
            try:
                for address in dict.fromkeys(addresses):
                    probe = held.enter_context(socket.socket())
                    probe.bind((address, port))
                    port = probe.getsockname()[1]
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


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
