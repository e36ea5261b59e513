"""Ring: one rank of an all-reduce that measures what the wires carry. Prints JSON."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ...trainer.rendezvous import meet

_GPU_BYTES = 256 * 2**20
_CPU_BYTES = 4 * 2**20
_ROUNDS = 5
_LIMIT = timedelta(seconds=20)


def measure() -> float:
    """Bytes per second that each rank sends while all of them sum a buffer up.

    Raises:
        RuntimeError: The sum is wrong, or the ranks do not come together.
    """
    gpu, world = torch.cuda.is_available(), dist.get_world_size()
    elements = (_GPU_BYTES if gpu else _CPU_BYTES) // 4
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    best_s = float("inf")
    for _ in range(_ROUNDS):
        buffer_N = torch.ones(elements, device=device)
        dist.barrier()
        begin_s = time.perf_counter()
        dist.all_reduce(buffer_N)
        if gpu:
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begin_s)
        if not bool((buffer_N == world).all()):
            raise RuntimeError(f"{world} ones do not add up to {world}")
    return 2 * (world - 1) / world * 4 * elements / best_s


def _sum_over_gloo() -> None:
    """Saves go over gloo beside NCCL, and it may choose another interface."""
    dist.all_reduce(torch.ones(1), group=dist.new_group(backend="gloo", timeout=_LIMIT))


def main() -> None:
    """Join the others, measure, and print what was found."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    meet("nccl" if gpu else "gloo", _LIMIT)
    if gpu:
        _sum_over_gloo()
    print(json.dumps({"bytes_per_s": measure()}), flush=True)
    # Whoever leaves first must not look like a failure to the others.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
