"""The folders that wandb leaves in a run's: one per attempt, to upload where it was offline."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..run_directory import RunDirectory

_UPLOADED, _CUT_OFF = "uploaded", "cut-off"
_CATCH_UP_S = 300.0
_STDERR = 2


def mark_uploaded(folder: Path) -> None:
    """All of an online attempt is on the server."""
    with suppress(OSError):
        (folder / _UPLOADED).touch()


def not_uploaded(run_dir: Path) -> list[Path]:
    """The folders of attempts to upload, oldest first; none without tracking.

    One whose upload was cut off is none of them: its rows would be on the server twice.
    """
    return [folder for folder in _folders(run_dir) if _waits(folder)]


def _waits(folder: Path) -> bool:
    log = next(folder.glob("run-*.wandb"), None)
    return (
        log is not None
        and not folder.is_symlink()
        and not any((folder / mark).exists() for mark in (_UPLOADED, _CUT_OFF))
        and not log.with_name(log.name + ".synced").exists()
    )


def claim(run_dir: Path) -> IO[bytes] | None:
    """The lock of who tracks the run, held while it is open; None where another one still does."""
    with suppress(OSError):
        lock = (run_dir / "wandb" / "tracker.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            lock.close()
    return None


def catch_up(run_dir: Path) -> str:
    """Upload attempts that were offline, before an attempt that is online begins.

    wandb appends what it uploads to what the server has of the run, and a history goes forward
    only: attempts after the last one that was online have their place now, and no others have.
    Nothing is raised; what is not uploaded within 300 s is left for `sync_command`, but for the
    attempt that was being uploaded then, which is on the server in part.

    Returns:
        Why not all of them were sent, in words; empty when they were. An attempt that is online
        now would leave the rest no place.
    """
    newest = max((_begun(path) for path in _folders(run_dir) if _was_online(path)), default="")
    folders = [path for path in not_uploaded(run_dir) if _begun(path) > newest]
    if not folders:
        return ""
    what = "the upload of earlier attempts"
    try:
        code = _sync(run_dir, folders)
    except OSError as error:
        return f"{what} cannot be started: {error.strerror}"
    left = [folder for folder in folders if _waits(folder)]
    if code is None and left:
        with suppress(OSError):
            (left[0] / _CUT_OFF).touch()
        return f"{what} took more than {_CATCH_UP_S:.0f} s ({left[0].name} is there in part)"
    return f"{what} failed (wandb sync ended with exit code {code})" if code or left else ""


def _sync(run_dir: Path, folders: list[Path]) -> int | None:
    """The exit code of wandb's own upload; None when it took too long, and was ended.

    Raises:
        OSError: It cannot be started.
    """
    command = [sys.executable, "-P", "-m", "wandb", "sync", *map(str, folders)]
    environment = dict(os.environ)
    if not Path(environment.get("WANDB_DIR") or ".", "wandb", "settings").exists():
        environment["WANDB_DIR"] = str(run_dir)  # for the log of the command
    # stdout of the process that tracks is for its answers.
    syncing = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=_STDERR, stderr=_STDERR
    )
    try:
        return syncing.wait(_CATCH_UP_S)
    except subprocess.TimeoutExpired:
        _end(syncing)
    return None


def sync_command(run_dir: Path) -> str | None:
    """What uploads the attempts that are not on the server; None when all are.

    wandb uploads the folders of one run in the order in which they were begun.
    """
    folders = not_uploaded(run_dir)
    if not folders:
        return None
    shown = f"{RunDirectory(run_dir)}/wandb"
    cut = [folder.name for folder in _folders(run_dir) if (folder / _CUT_OFF).exists()]
    if not cut and not any(map(_was_online, folders)):
        return f"wandb sync {shlex.quote(shown)}/offline-run-*"
    names = " ".join(shlex.quote(f"{shown}/{folder.name}") for folder in folders)
    # A comment of the shell's.
    note = f"  # {', '.join(cut)}: there in part, twice if sent again" if cut else ""
    return f"wandb sync --include-online {names}{note}"


def _folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("*run-*-*"), key=_begun)


def _begun(folder: Path) -> str:
    return folder.name.split("run-")[1]


def _was_online(folder: Path) -> bool:
    return folder.name.startswith("run-")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it started."""
    with suppress(Exception):
        import psutil

        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()
