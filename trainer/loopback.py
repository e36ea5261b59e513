"""Loopback: the network interface that reaches this machine alone."""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The variable that names the interface on which gloo listens; an exact name."""

_NAMES = ("lo", "lo0")  # of Linux and of macOS


def keep_to_loopback(environment: MutableMapping[str, str]) -> None:
    """Let gloo listen on loopback only, unless an interface is named already.

    By itself it listens on the address that the machine's name stands for.
    """
    name = next((name for _, name in socket.if_nameindex() if name in _NAMES), None)
    if name is not None:
        environment.setdefault(GLOO_INTERFACE, name)
