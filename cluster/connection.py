"""Connection: a driver joins the cluster that it was started in."""

from __future__ import annotations

import logging
import os
import socket
import time

from ..errors import RunError

_CONNECT_S = 30.0


def connect() -> None:
    """Join the cluster of the environment, quietly.

    Raises:
        RunError: There is none, or it does not let this process in.
    """
    import ray

    fix = "start the driver as a Ray job (`longspan submit`), or set RAY_ADDRESS"
    address = os.environ.get("RAY_ADDRESS", "")
    # Ray would ask there for ever.
    if address.rpartition(":")[2].isdigit() and not _answers(address):
        raise RunError(f"no Ray cluster answers at {address} within {_CONNECT_S:.0f} s", fix)
    try:
        # Its words come by the file that rank 0 writes, not by Ray.
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise RunError(f"no Ray cluster could be joined: {line}", fix) from error


def _answers(address: str) -> bool:
    """Whether somebody listens at `host:port`; a head that starts is waited for."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _CONNECT_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
                return True
        except (OSError, OverflowError):
            time.sleep(1.0)
    return False
