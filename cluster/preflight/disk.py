"""Disk: room for the checkpoints that stay, and for what a node keeps for itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...trainer.checkpoint.urls import is_url
from ...trainer.parameters import count_parameters
from ...trainer.settings import RunSettings
from .result import Result, size

CHECK = "disk"
_BYTES = 12
"""Of a parameter in a checkpoint: its value and two moments in fp32."""

_OWN_BYTES = 2**30


def checkpoint_bytes(run: RunSettings, vocab: int) -> int:
    """The size of one checkpoint."""
    stages = (count_parameters(run.model, vocab, stage.attention) for stage in run.stages)
    return _BYTES * max(stages)


def places(run: RunSettings, run_dir: Path) -> dict[str, Path]:
    """The folders that need room: of checkpoints, if they lie in one, and of temporary files."""
    own = {"temporary": Path(tempfile.gettempdir())}
    where = run.checkpoint.where.removeprefix("file://")
    return own if is_url(where) else {"checkpoints": run_dir / Path(where).expanduser(), **own}


def probe(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Free bytes where each folder is, or will be; `error` if that cannot be known."""
    free: dict[str, Any] = {}
    try:
        for name, folder in folders.items():
            there = folder
            while not there.exists():
                there = there.parent
            free[name] = shutil.disk_usage(there).free
    except OSError as error:
        free["error"] = f"{error.strerror or error} ({error.filename})"
    return free


def judge(nodes: Mapping[str, Mapping[str, Any]], one: int, keep: int) -> Iterator[Result]:
    """One result per node.

    Args:
        nodes: Free bytes on each.
        one: The size of a checkpoint.
        keep: Checkpoints that stay; while the next one is written, there is one more.
    """
    for node, free in nodes.items():
        if error := free.get("error"):
            fix = "see that the folder is there for the user that runs Ray"
            yield Result(node, CHECK, "fail", str(error), "folders that can be looked at", fix)
            continue
        room, own = free.get("checkpoints"), free["temporary"]
        parts = [f"{size(own)} for temporary files"]
        expected = f"{size(_OWN_BYTES)} for temporary files"
        if room is not None:
            needed = one * (keep + 1)
            parts.insert(0, f"{size(room)} for checkpoints")
            expected = f"{size(needed)} for {keep} checkpoints and one more, {expected}"
            if room < needed:
                level = "fail" if room < one else "warn"
                fix = "free some space, or set checkpoint.keep or checkpoint.where"
                yield Result(node, CHECK, level, parts[0] + " free", expected, fix)
                continue
        if own < _OWN_BYTES:
            fix = "free some space in the node's folder for temporary files"
            yield Result(node, CHECK, "warn", parts[-1] + " free", expected, fix)
        else:
            yield Result(node, CHECK, "ok", ", ".join(parts) + " free", expected)
