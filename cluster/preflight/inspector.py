"""Inspector: what looks at one node from inside. It knows nothing of Ray, which runs it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...redact import redact_text
from ..interfaces import find_interface, variables
from . import bandwidth, clock, devices, disk, network, storage, versions


class Inspector:
    """Looks at the node it runs on. Its answers are plain values.

    Args:
        node: The node's name.
        address: The node's address.
        interface: The network interface that ranks will use; None: as they choose.
    """

    def __init__(self, node: str, address: str, interface: str | None) -> None:
        self._node, self._address, self._interface = node, address, interface
        self._doing = "starting"
        self._listener: network.Listener | None = None

    def doing(self) -> str:
        """What it is at, for a node that does not answer."""
        return self._doing

    def look(
        self, folder: Path, folders: Mapping[str, Path], ask: Callable[[], float], limit_s: float
    ) -> dict[str, Any]:
        """Everything that needs no other node.

        Args:
            folder: Where all nodes write.
            folders: See `disk.places`.
            ask: The driver's time.
            limit_s: For the devices.
        """
        with self._at("comparing clocks"):
            found: dict[str, Any] = {"clock": tuple(clock.probe(ask))}
        with self._at("reading versions"):
            found["versions"] = versions.probe()
        with self._at(f"writing to {folder}"):
            found["storage"] = storage.write(folder, self._node, self._node)
        with self._at("looking for room on disks"):
            found["disk"] = disk.probe(folders)
        with self._at("opening a port"):
            found["network"] = self._listen()
        with self._at("multiplying matrices"):
            found["devices"] = devices.probe(limit_s)
        return found

    def greet(self, folder: Path) -> dict[str, Any]:
        """What others need to meet a node that was looked at before."""
        with self._at(f"writing to {folder}"):
            wrote = storage.write(folder, self._node, self._node)
        with self._at("opening a port"):
            return {"storage": wrote, "network": self._listen()}

    def meet(
        self, peers: Mapping[str, tuple[str, int]], folder: Path, written: Mapping[str, str]
    ) -> dict[str, Any]:
        """Connect to other nodes, and read what they wrote."""
        with self._at("connecting to other nodes"):
            failed = network.reach(peers)
        with self._at(f"reading from {folder}"):
            return {"network": failed, "storage": storage.read(folder, written)}

    def port(self) -> tuple[str, int]:
        """Where the first rank of a group can listen."""
        return self._address, network.free_port(self._address)

    def reduce(self, group: bandwidth.Group, limit_s: float) -> dict[str, Any]:
        """Measure an all-reduce with others."""
        with self._at("measuring an all-reduce"):
            found = find_interface(self._interface, self._address)
            return bandwidth.probe(group, variables(self._interface, found), limit_s)

    def _listen(self) -> dict[str, Any]:
        try:
            self._address = find_interface(self._interface, self._address).address
            self._listener = network.Listener(self._address)
        except OSError as error:
            return {"error": redact_text(str(error.strerror or error))}
        return {"address": self._address, "port": self._listener.port}

    @contextmanager
    def _at(self, what: str) -> Iterator[None]:
        self._doing = what
        yield
        self._doing = "waiting"
