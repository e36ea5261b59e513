"""Folders that are built once, by whichever process comes first, and then only read."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import DataError
from .progress import say

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 3.0
_ELSEWHERE = "set LONGSPAN_CACHE to a folder on a local disk that you may write to"


def build_once(folder: Path, build: Callable[[Path], None], *, progress: bool) -> None:
    """Make `folder` by calling `build` with a scratch folder, unless it exists already.

    The scratch folder is renamed when all of it is on disk, so `folder` is complete or absent,
    whenever a process is killed. The lock dies with its holder; the next one sweeps what it left.

    Args:
        folder: The result; its parent is made if need be.
        build: Writes the files, none in subfolders of subfolders.
        progress: Whether to say on stderr that another process is being waited for.

    Raises:
        DataError: The disk is full or cannot be written to.
    """
    if folder.is_dir():
        return
    scratch = folder.with_name(folder.name + ".part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock"), progress):
            if folder.is_dir():
                return
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                build(scratch)
                for path in (*scratch.rglob("*"), scratch):
                    _sync(path)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            _sync(folder.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(folder, None) from error
        where = error.filename or folder
        raise DataError(f"cannot write {where}: {error.strerror}", _ELSEWHERE) from error


def disk_full(folder: Path, missing: int | None) -> DataError:
    """The error for a disk that filled up while `folder` was written.

    Args:
        folder: What was being written.
        missing: Bytes that still had to be written, if known.
    """
    more = "" if missing is None else f"; about {missing / 2**20:,.0f} MiB more are needed"
    what = f"no space left for {folder}{more} (nothing half-written was kept)"
    return DataError(what, "free some space, or set LONGSPAN_CACHE to a folder on a larger disk")


def is_full(error: OSError) -> bool:
    """Whether the disk, a quota or a limit on file sizes stopped a write."""
    return error.errno in _FULL


@contextmanager
def _lock(path: Path, progress: bool) -> Iterator[None]:
    started, told = time.monotonic(), False
    with path.open("a+") as file:
        while not _try_lock(file.fileno()):
            if progress and not told and time.monotonic() - started > _PATIENCE_SECONDS:
                file.seek(0)
                holder = file.read().strip() or "another process"
                say(f"waiting for {holder}, which prepares the same data (lock: {path})")
                told = True
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
