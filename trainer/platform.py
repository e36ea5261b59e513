"""Device, backend and thread counts of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

# Parameters of mallopt, see malloc.h of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend for this machine."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def barrier() -> None:
    """Wait for all ranks; NCCL wants to be told the device, and warns the user if it is not."""
    if torch.cuda.is_available():
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def processor() -> str:
    """What this process computes on, told apart where sums may round differently."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    named = None
    if (table := Path("/proc/cpuinfo")).is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", table.read_text("utf-8"), re.MULTILINE)
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def set_up(local_rank: int, local_ranks: int) -> None:
    """Take this rank's GPU, or its share of the cores that the machine's ranks may use."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    else:
        _keep_freed_memory()
    wanted = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(int(wanted) if wanted else max(1, (cores or 1) // local_ranks))


def _keep_freed_memory() -> None:
    """Let this process keep what it frees: a step frees and wants gigabytes of activations.

    Given back to the system, all of it would come again page by page: a fifth of a step's time at
    16K tokens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
