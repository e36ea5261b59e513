"""Needs: the packages that nodes have to have, since what is submitted is longspan's code only.

Nothing but the standard library is imported: some of them may be missing here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

NEEDS = {
    "megatron-core": ("megatron.core", "megatron-core>=0.16.1,<0.20"),
    "numpy": ("numpy", "numpy"),
    "psutil": ("psutil", "psutil"),
    "pyarrow": ("pyarrow", "pyarrow>=15"),
    "pydantic": ("pydantic", "pydantic>=2.11"),
    "PyYAML": ("yaml", "PyYAML>=6"),
    "ray": ("ray", "ray[default,train]>=2.52"),
    "rich": ("rich", "rich>=13"),
    "tokenizers": ("tokenizers", "tokenizers>=0.21"),
    "torch": ("torch", "torch>=2.10"),
}
"""What is imported, and what pip is asked for, by the name of the package."""

DRIVER = ("PyYAML", "pydantic", "ray", "rich")
"""Those without which the first process of a job cannot start."""


def missing(names: Iterable[str] = NEEDS) -> list[str]:
    """Those of some packages that cannot be imported here."""
    return [name for name in names if not _is_there(NEEDS[name][0])]


def install(names: Iterable[str], versions: Mapping[str, str]) -> str:
    """The command that installs packages.

    Args:
        names: Of the packages.
        versions: That some of them have to have; pip chooses the build, such as `+cpu`.
    """
    wanted = []
    for name in names:
        version = versions.get(name, "").partition("+")[0]
        wanted.append(f"{name}=={version}" if version[:1].isdigit() else NEEDS[name][1])
    return f"pip install {shlex.join(wanted)}"


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False
