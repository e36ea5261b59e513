"""Standing: which CUDA kernels serve, and which only those who ask for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from .program import installed

OVERRIDE = "LONGSPAN_CUDA"
"""Environment variable that names the kernels to use and no others, separated by commas."""

NAMES = {
    "top": "top-k by a radix select",
    "invert": "who chose each block, by counting",
    "merge": "many partial results as one",
}
"""The kernels and what they are."""

PROVEN = frozenset({"top", "invert", "merge"})
"""Kernels whose tests have passed on a GPU. Others serve only those who ask for them by name."""

_asked: ContextVar[frozenset[str] | None] = ContextVar("cuda_kernels", default=None)


@contextmanager
def use(*names: str) -> Iterator[None]:
    """Calls inside on a GPU use these kernels and no others, or fail with the reason why not."""
    token = _asked.set(_known(names))
    try:
        yield
    finally:
        _asked.reset(token)


def serves(name: str, tensor: Tensor) -> bool:
    """Whether a kernel is to be used for a tensor.

    Raises:
        ValueError: The environment variable names a kernel that does not exist.
    """
    if not tensor.is_cuda:
        return False
    asked = _asked.get()
    if asked is None and OVERRIDE in os.environ:
        asked = _known(_named())
    return name in PROVEN and installed() if asked is None else name in asked


def standing() -> Iterator[tuple[str, str, str]]:
    """Name of each kernel, what it is, and how it stands on a GPU."""
    given = os.environ.get(OVERRIDE)
    for name, about in NAMES.items():
        remark = "default on cuda"
        if not installed():
            remark = "cuda-core is not installed"
        elif given is not None:
            remark = f"{OVERRIDE}={given}" if name in _named() else "not asked for"
        elif name not in PROVEN:
            remark = f"not proven on cuda: only with {OVERRIDE}={name}"
        yield name, about, remark


def _named() -> tuple[str, ...]:
    """What the environment variable names."""
    names = (name.strip() for name in os.environ[OVERRIDE].split(","))
    return tuple(name for name in names if name)


def _known(names: tuple[str, ...]) -> frozenset[str]:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"there is no CUDA kernel {name!r}; there are {', '.join(NAMES)}")
    return frozenset(names)
