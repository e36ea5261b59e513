"""GPUs and cores that a run can use, found without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """What decides how many ranks a run has.

    Attributes:
        gpus: GPUs that torch can see; 0 trains on the CPU.
        cores: CPU cores that this process may use.
        world: Ranks that torchrun started over all nodes; None outside torchrun.
        local: Ranks that torchrun started on this node; None outside torchrun.
    """

    gpus: int
    cores: int
    world: int | None = None
    local: int | None = None


def this_machine() -> Machine:
    """The machine of this process."""
    world, local = _count_in("WORLD_SIZE"), _count_in("LOCAL_WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        world, local = None, None
    return Machine(gpu_count(), usable_cores(), world, local)


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_count() -> int:
    """GPUs that torch will see: none for a torch without CUDA, whatever is installed."""
    if torch_cuda() is None:
        return 0
    present = _driver_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else _visible(visible, present)


@cache
def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for; None for a CPU build or none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _visible(listed: str, present: int) -> int:
    """Entries of CUDA_VISIBLE_DEVICES up to the first that is no device, as CUDA counts them."""
    count = 0
    for entry in listed.split(","):
        name = entry.strip()
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdigit() and int(name) < present)):
            break
        count += 1
    # One GPU can be cut into several MIG devices.
    return count if "MIG-" in listed else min(count, present)


def _driver_gpus() -> int:
    """GPUs that the driver knows, from its management library."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return 0
        count = ctypes.c_uint()
        found = library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return 0
    return count.value if found else 0


def _count_in(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None
