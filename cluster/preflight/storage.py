"""Storage: every node writes into the run's folder what all others can read."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .links import cut_off
from .result import Result

CHECK = "storage"
_EXPECTED = "write, fsync, rename, and read what others wrote"
DRIVER = "the driver"
"""Whoever starts the ranks reads the run's folder as well."""

_PATIENCE_S = 5.0
"""Network file systems may answer from a cache for some seconds."""

_SLOW_S = 5.0


def file_name(node: str) -> str:
    """The file that a node writes."""
    return "".join(letter if letter.isalnum() else "-" for letter in node)


def write(folder: Path, node: str, text: str) -> dict[str, Any]:
    """Write this node's file as checkpoints are written.

    Returns:
        `seconds` it took, and `error` if it failed.
    """
    begin = time.monotonic()
    path = folder / file_name(node)
    temporary = path.with_name(path.name + ".writing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if path.read_text("utf-8") != text:
            return {"seconds": time.monotonic() - begin, "error": "it reads other than it wrote"}
    except OSError as error:
        what = f"{error.strerror or error} ({error.filename or path})"
        return {"seconds": time.monotonic() - begin, "error": what}
    return {"seconds": time.monotonic() - begin}


def read(folder: Path, written: Mapping[str, str]) -> list[str]:
    """The nodes whose file cannot be read here, or holds something else.

    Args:
        folder: Where all nodes wrote.
        written: What each wrote.
    """
    deadline, missing = time.monotonic() + _PATIENCE_S, list(written)
    while True:
        missing = [node for node in missing if not _reads(folder / file_name(node), written[node])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def judge(
    folder: Path,
    writes: Mapping[str, Mapping[str, Any]],
    reads: Mapping[str, Collection[str]],
) -> Iterator[Result]:
    """One result per node.

    Args:
        folder: The run's.
        writes: What `write` returned on each.
        reads: What `read` returned on each that could write, and in the driver.
    """
    apart = cut_off(reads, keep=(DRIVER,))
    for node, wrote in writes.items():
        if error := wrote.get("error"):
            fix = f"mount the storage of {folder} there, writable for the user that runs Ray"
            yield Result(node, CHECK, "fail", str(error), _EXPECTED, fix)
        elif others := apart.get(node):
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            found = f"it and {shown} do not see each other's files"
            fix = f"{folder} must be on one file system that all nodes mount at this path"
            yield Result(node, CHECK, "fail", found, _EXPECTED, fix)
        elif wrote["seconds"] > _SLOW_S:
            found = f"{wrote['seconds']:.1f} s for one small file"
            fix = "see what else uses that file system, and how it is mounted"
            yield Result(node, CHECK, "warn", found, f"{_SLOW_S:g} s at most", fix)
        else:
            yield Result(node, CHECK, "ok", f"{wrote['seconds']:.2g} s", _EXPECTED)


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text("utf-8") == text
    except OSError:
        return False
