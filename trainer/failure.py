"""How a rank ends: exit codes, the failure it leaves for the launcher, and its parent's death."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..errors import LongspanError, RunError
from ..redact import redact_text

COMPLETE = 0
CRASHED = 1
USER_ERROR = 2
STOPPED = 75
"""EX_TEMPFAIL: saved and resumable."""
INTERRUPTED = 130
"""The second Ctrl-C: ended without saving."""

LAUNCHER_PID = "LONGSPAN_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1
_SHOWN_LINES = 12
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TAIL_CHARACTERS = 8000
# A rank that aborts is often the victim of another one that went away.
_SECOND_HAND = (signal.SIGABRT, signal.SIGTERM)


@dataclass(frozen=True)
class Failure:
    """Why a rank ended.

    Attributes:
        rank: The global rank.
        kind: `user`: the message says it all; `internal`: the traceback is wanted.
        message: What to show.
        traceback: The formatted traceback.
        time: Unix seconds.
    """

    rank: int
    kind: Literal["user", "internal"]
    message: str
    traceback: str
    time: float

    @property
    def exit_code(self) -> int:
        """The exit code that belongs to the kind."""
        return USER_ERROR if self.kind == "user" else CRASHED


def record_failure(run_dir: Path, rank: int, error: BaseException) -> int:
    """Leave `error` in `logs/rank-N.failure.json` for the launcher, which shows it once.

    Never raises. Without a launcher of ours (under torchrun), or when the file cannot be
    written (a full disk), the message goes to stderr as well.

    Returns:
        The exit code that the rank should end with.
    """
    known = _as_user_error(error)
    failure = Failure(
        rank=rank,
        kind="internal" if known is None else "user",
        message=redact_text(str(known) if known else f"{type(error).__name__}: {error}"),
        traceback=redact_text("".join(traceback.format_exception(error))),
        time=time.time(),
    )
    path = failure_path(run_dir, rank)
    written = False
    with suppress(OSError):
        temporary = path.with_name(path.name + ".writing")
        temporary.write_text(json.dumps(asdict(failure)), "utf-8")
        temporary.replace(path)
        written = True
    if not written or LAUNCHER_PID not in os.environ:
        shown = failure.message if known else failure.traceback
        with suppress(OSError):
            print(f"rank {rank}: {shown}", file=sys.stderr, flush=True)
    return failure.exit_code


def shown(failure: Failure) -> str:
    """What to print of a failure: of one that the user can mend, the message says it all."""
    lines = [f"\nerror: {failure.message}"]
    if failure.kind == "internal" and failure.traceback:
        lines += [f"  {line}" for line in failure.traceback.rstrip().splitlines()[-_SHOWN_LINES:]]
    return "\n".join(lines)


def failure_path(run_dir: Path, rank: int) -> Path:
    """Where `record_failure` writes."""
    return Path(run_dir) / "logs" / f"rank-{rank}.failure.json"


def read_failures(run_dir: Path) -> list[Failure]:
    """The failures that the ranks left, earliest first."""
    found = []
    for path in (Path(run_dir) / "logs").glob("rank-*.failure.json"):
        try:
            found.append(Failure(**json.loads(path.read_text("utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda failure: failure.time)


def first_cause(
    failures: Sequence[Failure],
    codes: Mapping[int, int],
    lost: Callable[[int, int], Failure],
) -> Failure | None:
    """What to show for ranks that failed: the first cause, not the ranks that it took along.

    Args:
        failures: What they left, earliest first.
        codes: Exit codes of those that had failed before any was told to end.
        lost: Describes a rank that left nothing, by its number and exit code.
    """
    explained = {failure.rank for failure in failures}
    silent = {rank: code for rank, code in codes.items() if rank not in explained}
    # Ranks that notice the end of another one say so; the one that cannot came first.
    first = {rank: code for rank, code in silent.items() if -code not in _SECOND_HAND}
    if failures and not first:
        return failures[0]
    if not silent:
        return None
    rank, code = min((first or silent).items(), key=lambda item: item[1])
    return lost(rank, code)


def without_words(rank: int, code: int, log: Path) -> Failure:
    """The failure of a rank that left none.

    Args:
        rank: Its number.
        code: Its exit code; the negative number of a signal that killed it.
        log: What it printed.
    """
    how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    tail = log.read_text("utf-8", "replace")[-_TAIL_CHARACTERS:] if log.exists() else ""
    kind = "user" if code == USER_ERROR else "internal"
    words = f"rank {rank} {how} and left no message"
    return Failure(rank, kind, words, redact_text(tail), time.time())


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return name + (" (out of memory?)" if number == signal.SIGKILL else "")


def clear_failures(run_dir: Path) -> None:
    """Forget the failures of an earlier attempt."""
    for path in (Path(run_dir) / "logs").glob("rank-*.failure.json"):
        path.unlink(missing_ok=True)


def die_with_parent() -> None:
    """End this process when its launcher dies; call first thing in a worker.

    Without a launcher of ours (under torchrun) it does nothing.
    """
    launcher = int(os.environ.get(LAUNCHER_PID, "0"))
    if not launcher:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(launcher,), daemon=True).start()
    # The launcher may have died before the request was made.
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _as_user_error(error: BaseException) -> LongspanError | None:
    """`error` as a problem that the user can mend, if it is one."""
    if isinstance(error, LongspanError):
        return error
    cause: BaseException | None = error
    # Writers wrap the error of the system, some only in words.
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in _DISK_FULL
        if full or "No space left on device" in str(cause):
            where = getattr(cause, "filename", None)
            return RunError(
                "the disk is full" + (f": {where} could not be written" if where else ""),
                "free some space, then resume; the checkpoints written before are intact",
            )
        cause = cause.__cause__ or cause.__context__
    return None
