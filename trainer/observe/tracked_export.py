"""An export, told to whoever tracks its run."""

from __future__ import annotations

from pathlib import Path

from ..run_directory import RunDirectory
from ..settings import TrackingSettings
from .sink import Sink
from .tracking import WANDB, Tracking, identity
from .tracking_pipe import TrackingPipe
from .wandb_account import resolve_mode


class _Lines(Sink):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.said.append(text.replace("training goes on", "the export is complete"))


def track_export(directory: RunDirectory, out: Path, checkpoint: str) -> list[str]:
    """Refer to an exported model in the W&B run that its run has, if it has one.

    A run that is at work is left alone. It takes 10 s at most, and never raises for W&B.

    Args:
        directory: Of the run.
        out: The folder of the model.
        checkpoint: Its name.

    Returns:
        What there is to say about it.
    """
    known = identity(directory)
    if not known or (directory.owner() is not None and not directory.is_complete()):
        return []
    settings = directory.load_settings().tracking
    if (mode := resolve_mode(settings)) == "off":
        return []
    lines = _Lines()
    try:
        pipe = TrackingPipe(WANDB, directory.logs / "wandb.log", lines)
    except OSError as error:
        return [f"{WANDB} is off: {error}"]
    pipe.send("begin", _begin(directory, settings, mode, known["wandb"]))
    Tracking(pipe, attempt=0, run_id=known["wandb"]).exported(out.absolute(), checkpoint)
    return lines.said[-1:]


def _begin(
    directory: RunDirectory, settings: TrackingSettings, mode: str, run_id: str
) -> dict[str, object]:
    path = directory.path
    whole = {"events": str(directory.events), "events_size": 2**62, "pid": 0, "attempt": 0}
    names = {"dir": str(path), "name": path.name, "project": settings.project, "id": run_id}
    return {"back": "wandb", "mode": mode, "config": None, **whole, **names}
