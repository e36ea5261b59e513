"""The folders that wandb leaves in a run's: one per attempt, to upload where it was offline."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from ..run_directory import RunDirectory

_UPLOADED = "uploaded"


def mark_uploaded(folder: Path) -> None:
    """All of an online attempt is on the server."""
    with suppress(OSError):
        (folder / _UPLOADED).touch()


def not_uploaded(run_dir: Path) -> list[Path]:
    """The folders of attempts that are not on the server, oldest first; none without tracking."""
    folders = sorted(
        (run_dir / "wandb").glob("*run-*-*"), key=lambda path: path.name.split("run-")[1]
    )
    logs = [(folder, next(folder.glob("run-*.wandb"), None)) for folder in folders]
    return [
        folder
        for folder, log in logs
        if log is not None
        and not folder.is_symlink()
        and not (folder / _UPLOADED).exists()
        and not log.with_name(log.name + ".synced").exists()
    ]


def sync_command(run_dir: Path) -> str | None:
    """What uploads the attempts that are not on the server; None when all are.

    wandb uploads the folders of one run in the order in which they were begun.
    """
    folders = not_uploaded(run_dir)
    if not folders:
        return None
    shown = f"{RunDirectory(run_dir)}/wandb"
    if not any(folder.name.startswith("run-") for folder in folders):
        return f"wandb sync {shlex.quote(shown)}/offline-run-*"
    names = " ".join(shlex.quote(f"{shown}/{folder.name}") for folder in folders)
    return f"wandb sync --include-online {names}"
