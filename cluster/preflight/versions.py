"""Versions: ranks that run different code compute different things, or wait for each other."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...redact import hidden_names
from ...trainer.observe.wandb_account import KEY
from ...trainer.settings import TrackingSettings
from ..needs import NEEDS, install, missing
from .result import Result

CHECK = "versions"
CUDA_DRIVER = "CUDA driver"
_WANDB = "wandb"
_OURS = ("python", "longspan", "ray")
"""The process that starts the ranks has to have these as well."""

_PACKAGES = ("ray", "torch", "megatron-core", "triton", _WANDB)
_FOLDERS = ("attention", "cluster", "kernels", "parallel", "recipes", "trainer")
_SUFFIXES = (".py", ".cu", ".yaml")
_MISSING, _UNKNOWN = "missing", "unknown"


def probe() -> dict[str, str]:
    """The versions of this node, and what it lacks.

    Of longspan it is the content, which an editable checkout changes.
    """
    found = {"python": platform.python_version(), "longspan": _content()}
    lacks = dict.fromkeys(missing(), _MISSING)
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on PYTHONPATH has no version
            found[package] = _UNKNOWN if package in NEEDS else _MISSING
    return {**found, **lacks, CUDA_DRIVER: _cuda_driver()}


def reference(nodes: Mapping[str, Mapping[str, str]], ours: Mapping[str, str]) -> dict[str, str]:
    """What all nodes should have.

    Args:
        nodes: What each has.
        ours: What this process has; it need not have the GPU parts that nodes have.

    Returns:
        Ours of what starts ranks, and of the rest what most nodes have. Those that lack something
        count only where all do: no rank could start on them.
    """
    expected = dict(ours)
    whole = [found for found in nodes.values() if not _lacks(found)] or [*nodes.values()]
    for name in ours:
        counts = Counter(found.get(name, _MISSING) for found in whole)
        if name not in _OURS and counts:
            # Where as many have another one, ours decides.
            expected[name] = max(counts, key=lambda value: (counts[value], value == ours[name]))
    return expected


def judge(nodes: Mapping[str, Mapping[str, str]], expected: Mapping[str, str]) -> Iterator[Result]:
    """One result per node; another CUDA driver is a warning, since it may do as well."""
    for node, found in nodes.items():
        other = [
            name
            for name in expected
            if name != _WANDB and found.get(name, _MISSING) != expected[name]
        ]
        # What no node has is the same everywhere, and no rank could start.
        if lacks := _lacks(found):
            words = _words(found, [*lacks, *(name for name in other if name not in lacks)])
            fix = f"on the node: {install(lacks, expected)}"
            yield Result(node, CHECK, "fail", words, "what longspan imports", fix)
            continue
        if not other:
            words = _words(found, ("python", "torch", "megatron-core"))
            yield Result(node, CHECK, "ok", words, "the same everywhere")
            continue
        level = "warn" if other == [CUDA_DRIVER] else "fail"
        fix = "install the same on all nodes, or use one image for all of them"
        if other == ["longspan"]:
            fix = "remove longspan from the node's own packages: a submitted run brings its own"
        yield Result(node, CHECK, level, _words(found, other), _words(expected, other), fix)


def judge_tracking(
    nodes: Mapping[str, Mapping[str, str]], tracking: TrackingSettings
) -> Iterator[Result]:
    """A warning for each node that could not track the run, where its metrics may be expected.

    Ranks need no tracker, and only the node of rank 0 uses it.
    """
    lacking = [node for node, found in nodes.items() if found.get(_WANDB, _MISSING) == _MISSING]
    expected = tracking.wandb in ("online", "offline") or (
        # With auto a cluster without a key and without the package is one without a tracker.
        tracking.wandb == "auto" and (len(lacking) < len(nodes) or KEY in hidden_names(os.environ))
    )
    for node in lacking if expected else ():
        fix = "on the node: pip install wandb, or set tracking.wandb: off"
        words = f"installed, as tracking.wandb is {tracking.wandb}"
        yield Result(node, CHECK, "warn", f"{_WANDB} missing", words, fix)


def _lacks(found: Mapping[str, str]) -> list[str]:
    return [name for name in NEEDS if found.get(name) == _MISSING]


def _words(versions: Mapping[str, str], names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"{name} {versions.get(name, _MISSING)}" for name in names)


@cache
def _content() -> str:
    """Twelve hex digits that two copies of the package share exactly when they are equal."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    files = [*root.glob("*.py")]
    for folder in _FOLDERS:
        files += (file for file in (root / folder).rglob("*") if file.suffix in _SUFFIXES)
    for name in sorted(file.relative_to(root).as_posix() for file in files):
        digest.update(f"{name}\0".encode() + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cuda_driver() -> str:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return "none"
        text = ctypes.create_string_buffer(96)
        library.nvmlSystemGetDriverVersion(text, len(text))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return "none"
    return text.value.decode("ascii", "replace")
