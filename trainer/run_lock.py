"""RunLock: keeps two launches from working in one folder, and a new one from an old one's ranks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import RunError

_POLL_S = 0.05
_ENDING_S = 10.0
"""Seconds in which ranks whose launcher was killed are expected to end."""

# What a file system says that has no locks (some network mounts): the lock is advisory.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class Owner:
    """The process that holds a run's lock.

    Attributes:
        pid: Its number on `host`.
        host: Its machine.
        since: When it took the lock, in unix seconds.
    """

    pid: int
    host: str
    since: float

    @property
    def has_ended(self) -> bool:
        """Whether it is gone; processes of other machines are taken for alive."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            return False
        return False


def holder(file: Path) -> Owner | None:
    """Who works on a run now, by its lock; None when nobody does. Changes nothing.

    Where a lock cannot be tested, a process of this machine that is alive counts.
    """
    owner = _owner(file)
    # A lock that nobody holds is not taken, even for a moment, where a launch could meet it.
    if owner is None or owner.has_ended:
        return None
    try:
        with file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return owner
    except OSError as error:
        return owner if error.errno in _NO_LOCKS else None
    return None


@contextmanager
def run_lock(file: Path, place: str) -> Iterator[int]:
    """Keep other launches off a folder until the block ends or this process dies.

    Args:
        file: The lock; made when missing.
        place: The folder as the user would type it.

    Yields:
        The open file that is the lock. Processes that inherit it hold it as long as they live.

    Raises:
        RunError: Another live process holds it, or it cannot be made.
    """
    with _open(file, place) as lock:
        _take(lock, file, place)
        lock.seek(0)
        lock.truncate()
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        lock.write(json.dumps(owner) + "\n")
        lock.flush()
        yield lock.fileno()


def _open(file: Path, place: str) -> IO[str]:
    try:
        return file.open("a+", encoding="utf-8")
    except OSError as error:
        fix = "check the folder's owner and permissions, or give another --run-dir"
        raise RunError(f"{place} cannot be locked: {error.strerror or error}", fix) from error


def _take(lock: IO[str], file: Path, place: str) -> None:
    """Lock, or wait a little for the ranks of a launcher that was killed."""
    deadline = time.monotonic() + _ENDING_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
        owner = _owner(file)
        orphans = owner is not None and owner.has_ended
        if not orphans or time.monotonic() > deadline:
            raise _in_use(place, owner, orphans)
        time.sleep(_POLL_S)


def _in_use(place: str, owner: Owner | None, orphans: bool) -> RunError:
    who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
    if orphans:
        return RunError(
            f"{place} is in use by ranks of {who}, which itself has ended",
            "wait until they have ended as well, or kill them",
        )
    return RunError(
        f"{place} is in use by {who}",
        "wait for it or stop it (Ctrl-C there saves first), or give another --run-dir",
    )


def _owner(file: Path) -> Owner | None:
    """Who took the lock last, if the file tells."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return Owner(int(found["pid"]), str(found["host"]), float(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
