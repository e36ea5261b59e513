"""Rendezvous: where ranks meet, open at the one address that they were given."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist


def meet(backend: str, timeout: timedelta) -> None:
    """Join the other ranks: MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE say who and where.

    Args:
        backend: Of torch.distributed.
        timeout: How long anything may wait for others.

    Raises:
        OSError: Rank 0 cannot listen there.
    """
    if dist.is_torchelastic_launched():  # torchrun has made the store, or says who shall
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]  # it is documented
        host,
        port,
        world,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=_listen(host, port) if rank == 0 else None,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _listen(host: str, port: int) -> int:
    """A socket for the store, which by itself would listen at every address of the machine."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        # The port of a gang that has just ended can be had at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener.detach()
