"""Stacks: where the processes of a node hang, written to the run's logs before they are ended."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..redact import redact_text

NO_RIGHTS = "it needs the right to trace: CAP_SYS_PTRACE"
_REFUSED = re.compile(r"permission|not permitted", re.IGNORECASE)
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


def dump(pids: Mapping[int, int], logs: Path, station: Path, attempt: int, limit_s: float) -> None:
    """Write the stacks of ranks, and have their flight recorders written.

    What cannot be had is said in the file; nothing is raised. Ranks whose stacks are there already
    are left out: several of a node may fail, and each sees to the others.

    Args:
        pids: The process of each rank.
        logs: Where the files go.
        station: A folder of the node, where the pipes are.
        attempt: The number of the attempt.
        limit_s: Seconds that it may take.
    """
    paths = {rank: logs / f"stack-attempt-{attempt}-rank-{rank}.txt" for rank in pids}
    wanted = {rank: pid for rank, pid in pids.items() if _claimed(paths[rank])}
    for rank in wanted:
        _ask_recorder(station / f"nccl-{rank}.pipe")
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        texts = pool.map(lambda pid: _stack(pid, limit_s), wanted.values())
        for rank, text in zip(wanted, texts, strict=True):
            with suppress(OSError):
                paths[rank].write_text(redact_text(text), "utf-8")


def _claimed(path: Path) -> bool:
    """Whether nobody else writes this file; where none can be made, nobody does."""
    with suppress(OSError):
        path.open("x").close()
        return True
    return False


def _ask_recorder(pipe: Path) -> None:
    with suppress(OSError):
        handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(handle, b"1\n")
        finally:
            os.close(handle)


def _stack(pid: int, limit_s: float) -> str:
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
            timeout=limit_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}\n"
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        rights = f"({NO_RIGHTS})\n" if _REFUSED.search(why) else ""
        return f"no stacks: py-spy says: {why}\n{rights}"
    return done.stdout
