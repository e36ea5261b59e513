"""What this machine offers to a run, what is used and what is missing. Never raises."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .. import __version__
from .devices import torch_cuda, usable_cores
from .settings import TrackingSettings

_PACKAGES = ("torch", "megatron-core", "numpy", "pydantic", "tokenizers", "pyarrow", "wandb")

# Module, package, what it would give, how to get it.
_OPTIONAL = (
    ("flash_attn", "flash-attn", "fused attention on GPUs", "pip install flash-attn"),
    (
        "transformer_engine",
        "transformer-engine",
        "FP8 and fused layers on GPUs",
        'pip install "transformer-engine[pytorch]"',
    ),
    ("apex", "apex", "fused optimizers on GPUs", "build it from NVIDIA's repository"),
    (
        "deepspeed",
        "deepspeed",
        "ZeRO and offloading as a second engine",
        "pip install deepspeed",
    ),
)

Row = tuple[str, str, str]
"""Name, what was found, and a remark."""


def diagnose(*more: tuple[str, Callable[[], Iterator[Row]]]) -> RenderableType:
    """Device, attention kernel, packages, tracking and optional parts, as tables.

    Args:
        more: Titles and rows of the floors above.
    """
    sections = (
        ("Machine", _machine),
        ("Attention", _attention),
        ("Packages", _packages),
        ("Tracking", _tracking),
        *more,
        ("Optional, not used by this version yet", _optional),
    )
    return Group(*(_section(title, rows) for title, rows in sections))


def _section(title: str, rows: Callable[[], Iterator[Row]]) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    try:
        for row in rows():
            table.add_row(*map(Text, row))
    except Exception as error:  # a broken installation is what the doctor is for
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        table.add_row(Text("broken"), Text(said), Text("reinstall the package it names"))
    return Group(Text(title, style="bold"), table)


def _machine() -> Iterator[Row]:
    cores = usable_cores()
    yield "python", platform.python_version(), f"{sys.platform} {platform.machine()}"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    remark = f"OMP_NUM_THREADS={threads}" if threads else "shared among the ranks of a run"
    yield "CPU cores", str(cores), remark
    import torch

    if not torch.cuda.is_available():
        yield "device", "CPU", _why_no_gpu()
        yield "backend", "gloo", "between the ranks"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        remark = f"{gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        yield f"GPU {index}", gpu.name, remark
    yield "backend", "nccl", "between the ranks"


def _why_no_gpu() -> str:
    if torch_cuda() is None:
        return "this torch is built for CPUs; for NVIDIA GPUs install the CUDA build of torch"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides the GPUs"
    return f"torch is built for CUDA {torch_cuda()} and sees no GPU; see nvidia-smi"


def _attention() -> Iterator[Row]:
    import torch

    from ..kernels.backends import standing
    from ..kernels.cuda.standing import standing as cuda_standing

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield from standing(device)
    if device == "cuda":
        yield from cuda_standing()


def _packages() -> Iterator[Row]:
    yield "longspan", __version__, ""
    for name in _PACKAGES:
        found = _version(name)
        yield name, found or "missing", "" if found else f"pip install {name}"
    yield "CUDA", torch_cuda() or "none", "that torch is built for"


def _tracking() -> Iterator[Row]:
    from .observe.wandb_account import resolve_mode

    mode = resolve_mode(TrackingSettings())
    remark = "metrics go to Weights & Biases as well"
    if mode == "off":
        remark = "metrics stay in the run directory; for Weights & Biases run `wandb login`, set "
        remark += "WANDB_API_KEY, or WANDB_MODE=offline to write files without an account"
    yield "wandb", mode, remark
    found = _version("tensorboardX")
    remark = "event files for recipes with tracking: tensorboard"
    yield (
        "tensorboardX",
        found or "missing",
        remark if found else f"pip install tensorboardX: {remark}",
    )


def _optional() -> Iterator[Row]:
    for module, package, gives, install in _OPTIONAL:
        found = importlib.util.find_spec(module) is not None
        shown = (_version(package) or "installed") if found else "missing"
        yield package, shown, gives if found else f"{gives}: {install}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
