"""Backends: the one table that says what computes attention."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .request import Request

log = logging.getLogger(__name__)

OVERRIDE = "LONGSPAN_KERNELS"
"""Environment variable that names the backend to use instead of the table's choice."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: As in the override and in messages.
        about: What it is.
        module: With `refuses`, `forward` and `backward`; below this package.
        needs: The package that must be installed; None for none.
        proven: Device types on which its tests have passed on real hardware. On others it serves
            only those who ask for it by name.
    """

    name: str
    about: str
    module: str
    needs: str | None
    proven: frozenset[str]

    def load(self) -> Any:
        """The module."""
        return import_module(self.module, __package__)

    def refuses(self, request: Request) -> str | None:
        """Why it cannot serve a request; None if it can."""
        if self.needs is not None and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return self.load().refuses(request)


TABLE = (
    Backend("cudnn", "cuDNN through PyTorch", ".library.cudnn", None, frozenset({"cuda"})),
    Backend("triton", "own Triton kernels", ".triton.backend", "triton", frozenset({"cuda"})),
    Backend("flash", "FlashAttention-2 in PyTorch", ".library.flash", None, frozenset({"cuda"})),
    Backend("eager", "PyTorch's own operators", ".eager.backend", None, frozenset({"cpu", "cuda"})),
)
"""In order of preference: what was faster on an H200, see `benchmarks/results`."""

_asked: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Calls inside use this backend, or fail with the reason why they cannot."""
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(request: Request) -> Any:
    """The module that serves a request; the choice and its reason are logged once.

    Raises:
        ValueError: The backend asked for by name does not exist or cannot serve the request, or
            none can.
    """
    name = _asked.get() or os.environ.get(OVERRIDE)
    if name is not None:
        return _named(name, request)
    passed: list[str] = []
    for backend in TABLE:
        if request.device.type not in backend.proven:
            passed.append(f"{backend.name} is not proven on {request.device.type}")
            continue
        reason = backend.refuses(request)
        if reason is None:
            _log_once(backend.name, request.device.type, "; ".join(passed))
            return backend.load()
        passed.append(f"{backend.name}: {reason}")
    devices = sorted(set[str]().union(*(backend.proven for backend in TABLE)))
    raise ValueError(
        f"no attention backend serves {request.dtype} on {request.device}; nearest are the "
        f"devices {' and '.join(devices)} ({'; '.join(passed)})"
    )


def selection_steps(q_THD: Tensor) -> tuple[Any, Any]:
    """The classes `Scorer` and `BlockScores` for a selection by these queries.

    Raises:
        ValueError: The backend asked for by name does not exist.
    """
    name = _asked.get() or os.environ.get(OVERRIDE)
    if name is None:
        name = "triton" if _scores_by_triton(q_THD) else "eager"
    package = ".triton" if _by_name(name).name == "triton" else ".eager"
    _log_once(package[1:], q_THD.device.type, "scores of a selection")
    scorer = import_module(f"{package}.pooled_scores", __package__).Scorer
    return scorer, import_module(f"{package}.block_scores", __package__).BlockScores


def _scores_by_triton(q_THD: Tensor) -> bool:
    backend = _by_name("triton")
    if q_THD.device.type not in backend.proven or find_spec("triton") is None:
        return False
    return import_module(".triton.pooled_scores", __package__).refuses(q_THD) is None


def standing(device: str) -> Iterator[tuple[str, str, str]]:
    """Name of each backend, what it is, and how it stands on a type of device."""
    asked, choice = os.environ.get(OVERRIDE), 0
    for backend in TABLE:
        if backend.needs is not None and find_spec(backend.needs) is None:
            remark = f"{backend.needs} is not installed"
        elif asked is not None:
            remark = f"{OVERRIDE}={asked}" if backend.name == asked else "not asked for"
        elif device in backend.proven:
            choice += 1
            remark = f"choice {choice} on {device}, for what it can serve"
        else:
            remark = f"not used on {device}"
        yield backend.name, backend.about, remark
    if asked is not None and asked not in [backend.name for backend in TABLE]:
        yield asked, "no such backend", f"unset {OVERRIDE} or name one of these"


def _by_name(name: str) -> Backend:
    backend = next((b for b in TABLE if b.name == name), None)
    if backend is None:
        known = ", ".join(b.name for b in TABLE)
        raise ValueError(f"there is no attention backend {name!r}; there are {known}")
    return backend


def _named(name: str, request: Request) -> Any:
    backend = _by_name(name)
    reason = backend.refuses(request)
    if reason is not None:
        raise ValueError(f"the attention backend {name!r} cannot serve this: {reason}")
    return backend.load()


@lru_cache(maxsize=64)
def _log_once(name: str, device: str, passed: str) -> None:
    log.info("attention on %s: %s%s", device, name, f" ({passed})" if passed else "")
