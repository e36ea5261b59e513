"""Listing: runs as a table, and one run in full."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LongspanError
from ..redact import redact_text
from ..trainer.checkpoint.survey import columns
from ..trainer.observe.terminal import duration
from ..trainer.run_directory import RunDirectory
from ..trainer.status import read_status, render_status
from .jobs import Job, Jobs
from .registry import Record
from .standing import CLOCKS_S, Standing, stand, stand_alone
from .submission import cluster_of

_WORDS = {
    "new": "not started",
    "queued": "queued: the cluster is about to start it",
    "running": "running",
    "complete": "complete",
    "stopped": "stopped",
    "interrupted": "stopped before it had saved",
    "failed": "failed",
    "lost": "not running; it ended without a word",
    "unknown": "not known",
    "gone": "its folder is gone",
}
_LAST_LINES = 5
_PATIENCE_S = 5.0


def list_runs(
    records: Sequence[Record], *, everything: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """Runs as plain values, and as a table.

    Args:
        records: The runs, the newest first.
        everything: Those of this machine whose folder is gone, too.
    """
    found = stand(records)
    shown = [standing for standing in found if everything or standing.state != "gone"]
    lines = _table(shown) if shown else ["no runs yet; start one: longspan train quickstart"]
    if hidden := len(found) - len(shown):
        lines.append(f"{hidden} more without a folder; --all shows them")
    for note in dict.fromkeys(s.note for s in shown if s.note and s.job is None):
        names = [s.record.id for s in shown if s.note == note]
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"note: {names[0]}{rest}: {note}")
    return [standing.as_dict() for standing in shown], "\n".join(lines)


def show_run(run: Record | RunDirectory) -> tuple[dict[str, Any], str]:
    """All about one run, as plain values and as text.

    Raises:
        RunError: The folder holds no run.
    """
    if isinstance(run, RunDirectory) or run.cluster is None:
        status = read_status(run if isinstance(run, RunDirectory) else run.directory)
        return status.as_dict(), render_status(status)
    standing = stand_alone(run, _PATIENCE_S)
    values, lines, reason = standing.as_dict(), [], ""
    stopped = _WORDS["stopped"]
    if run.directory.is_run():
        status = read_status(run.directory)
        values |= {"folder": status.as_dict()}
        reason = status.reason if _has_written(standing) else ""
        stopped = replace(status, state="stopped").words
        # The words of a live run ask nobody to resume it.
        state = "running" if standing.is_live else status.state
        lines = render_status(replace(status, directory=run.id, state=state)).splitlines()[1:]
    else:
        lines = _from_afar(standing)
    return values, "\n".join([*_headline(standing, reason, stopped), *lines])


def _headline(standing: Standing, reason: str, stopped: str) -> list[str]:
    record, job = standing.record, standing.job
    assert record.cluster is not None
    words = (_WORDS | {"stopped": stopped}).get(standing.state, standing.state)
    if standing.state == "failed" and (why := reason or _how(job)):
        words += f": {why}"
    lines = [f"{record.id}: {words}"]
    where = f"  cluster {record.cluster.name}"
    if job is not None:
        where += f", job {job.id} {job.status.lower()}"
        if since := job.ended or job.started:
            ago = duration(max(0.0, time.time() - since))
            where += f" {ago} ago" if job.ended else f" since {ago}"
    lines.append(where)
    if standing.note:
        lines.append(f"  note: {standing.note}")
    return lines


def _has_written(standing: Standing) -> bool:
    """Whether the folder's newest event can be one of the newest job's."""
    started, when = standing.job and standing.job.started, standing.position.event_time
    return started is None or when is None or when > started - CLOCKS_S


def _how(job: Job | None) -> str:
    """How a driver ended that failed."""
    if job is None or job.exit_code is None:
        return ""
    if job.exit_code < 0:
        return f"its driver was killed by signal {-job.exit_code}"
    return f"its driver ended with exit code {job.exit_code}"


def _from_afar(standing: Standing) -> list[str]:
    """What can be said of a run whose folder is not visible here: the end of its output."""
    record, lines = standing.record, []
    unseen = "not visible from here"
    if record.cluster is not None and Path(record.cluster.storage).is_dir():
        unseen = "not there yet"
    lines.append(f"  folder: {record.run_dir} ({unseen})")
    if standing.job is not None:
        try:
            text = redact_text(Jobs(cluster_of(record)).logs(standing.job.id))
        except LongspanError:
            text = ""
        last = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
        lines += ["  its last lines:", *(f"    {line}" for line in last)] if last else []
    if not standing.is_live and standing.state != "complete":
        lines += ["go on with:", f"  longspan resume {record.id}"]
    return lines


def _table(shown: Sequence[Standing]) -> list[str]:
    head = ("run", "where", "state", "step", "loss", "started")
    return columns([head, *map(_row, shown)])


def _row(standing: Standing) -> tuple[str, ...]:
    at, place = standing.position, standing.record.cluster
    of = f"/{at.steps:,}" if at.steps is not None else ""
    return (
        standing.record.id,
        place.name if place else "here",
        standing.state,
        f"{at.step:,}{of}" if at.step is not None else "-",
        f"{at.loss:.4f}" if at.loss is not None else "-",
        f"{duration(max(0.0, time.time() - standing.record.created))} ago",
    )
