"""Stacks: where the processes of a node hang, written to the run's logs before they are ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..redact import redact_text

_SHOW_S = 15.0
# What NCCL's flight recorder of torch listens to: anything written there makes it write its file.
FLIGHT_PIPE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
FLIGHT_FILE = "TORCH_FR_DUMP_TEMP_FILE"
FLIGHT_BUFFER = "TORCH_FR_BUFFER_SIZE"


def flight_recorder(logs: Path, station: Path, attempt: int) -> dict[str, str]:
    """The environment that makes ranks on GPUs keep what their collectives did last.

    Args:
        logs: Where the files go.
        station: A folder of the node, for the pipes.
        attempt: The number of the attempt.
    """
    return {
        FLIGHT_BUFFER: "2000",
        FLIGHT_FILE: str(logs / f"nccl-attempt-{attempt}-rank-"),
        FLIGHT_PIPE: str(station / "nccl-"),
    }


def dump(pids: Mapping[int, int], logs: Path, station: Path, attempt: int) -> None:
    """Write the stacks of ranks, and have their flight recorders written.

    What cannot be had is said in the file; nothing is raised.

    Args:
        pids: The process of each rank.
        logs: Where the files go.
        station: A folder of the node, where the pipes are.
        attempt: The number of the attempt.
    """
    for rank in pids:
        _ask_recorder(station / f"nccl-{rank}.pipe")
    with ThreadPoolExecutor(max(1, len(pids))) as pool:
        for rank, text in zip(pids, pool.map(_stack, pids.values()), strict=True):
            path = logs / f"stack-attempt-{attempt}-rank-{rank}.txt"
            with suppress(OSError):
                path.write_text(redact_text(text), "utf-8")


def _ask_recorder(pipe: Path) -> None:
    with suppress(OSError):
        handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(handle, b"1\n")
        finally:
            os.close(handle)


def _stack(pid: int) -> str:
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.exists() else shutil.which("py-spy")
    if tool is None:
        return "no stacks: py-spy is not installed on this node\n"
    try:
        # Without stopping the process: one that is stopped already could not be stopped again.
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=_SHOW_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}\n"
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        return f"no stacks: py-spy says: {why}\n(it needs the right to trace: CAP_SYS_PTRACE)\n"
    return done.stdout
