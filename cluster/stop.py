"""Stop: ask a run to save and end, and say when it has."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

from ..errors import ClusterError, LongspanError, RunError
from ..trainer.checkpoint.choice import newest_step
from ..trainer.checkpoint.store import open_store
from ..trainer.failure import COMPLETE, CRASHED
from ..trainer.observe.events import read_events
from ..trainer.observe.terminal import duration
from ..trainer.run_directory import RunDirectory
from .jobs import Jobs
from .registry import Record
from .standing import Standing, stand_alone
from .submission import cluster_of

_POLL_S = 0.5
_PATIENCE_S = 60.0
"""How long a cluster may be silent before the wait for a stop ends."""


def stop_run(run: Record | RunDirectory, say: Callable[[str], None]) -> int:
    """Ask a run to save and stop, and wait until it has.

    Args:
        run: The run.
        say: Told what happens.

    Returns:
        0: it has saved or was complete; 1: it ended in another way.

    Raises:
        RunError: It is not running, or not where it can be stopped from here.
        ClusterError: Its cluster does not answer.
    """
    if isinstance(run, Record) and run.cluster is not None:
        standing = _stop_job(run, say)
        directory = run.directory if run.directory.is_run() else None
        return _tell(run.id, standing.state, directory, say)
    directory = run if isinstance(run, RunDirectory) else run.directory
    name = run.id if isinstance(run, Record) else str(directory)
    return _tell(name, _stop_process(name, directory, say), directory, say)


def _stop_job(record: Record, say: Callable[[str], None]) -> Standing:
    standing = stand_alone(record)
    job = standing.job
    if job is None and standing.note:
        fix = f"where it stands: longspan status {record.id}"
        raise ClusterError(f"{record.id} cannot be stopped: {standing.note}", fix)
    if job is None or not job.is_live:
        raise _not_running(record.id, standing.state)
    jobs = Jobs(cluster_of(record))
    jobs.stop(job.id)
    say(f"asked {record.id} to save and stop; Ctrl-C ends the waiting, not the stop")
    begun = heard = time.monotonic()
    while True:
        try:
            current = jobs.get(job.id)
            heard = time.monotonic()
        except ClusterError:
            if time.monotonic() - heard > _PATIENCE_S:
                raise
        else:
            if current is None or not current.is_live:
                say(f"its job has ended after {duration(time.monotonic() - begun)}")
                return stand_alone(record)
        time.sleep(_POLL_S)


def _stop_process(name: str, directory: RunDirectory, say: Callable[[str], None]) -> str:
    """Stop a run of this machine; how it ended."""
    if not directory.is_run():
        raise directory.no_run()
    owner = directory.owner()
    if owner is None:
        raise _not_running(name, "complete" if directory.is_complete() else _end(directory))
    if owner.host != socket.gethostname():
        what = f"{name} runs on {owner.host}, and this is {socket.gethostname()}"
        raise RunError(what, f"there: longspan stop {directory.path}")
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        what = f"{name} is run by somebody else (process {owner.pid})"
        raise RunError(what, "ask them to stop it") from None
    say(f"asked {name} to save and stop; Ctrl-C ends the waiting, not the stop")
    begun = time.monotonic()
    while (current := directory.owner()) is not None and current.pid == owner.pid:
        time.sleep(_POLL_S)
    say(f"it has ended after {duration(time.monotonic() - begun)}")
    return "complete" if directory.is_complete() else _end(directory)


def _end(directory: RunDirectory) -> str:
    """How the newest attempt ended."""
    how = "new"
    for event in read_events(directory.events):
        how = str(event.get("how")) if event.get("event") == "ended" else "lost"
    return how


def _not_running(name: str, state: str) -> RunError:
    if state == "complete":
        return RunError(f"{name} is not running: it is complete", "there is nothing to stop")
    words = {"new": "it was never started", "lost": "it ended without a word"}
    how = words.get(state, f"it is {state}")
    return RunError(f"{name} is not running: {how}", f"go on with it: longspan resume {name}")


def _tell(name: str, state: str, directory: RunDirectory | None, say: Callable[[str], None]) -> int:
    if state == "complete":
        say(f"{name} is complete; it had nothing left to stop")
        return COMPLETE
    step = None if directory is None else _newest(directory)
    if state == "stopped":
        say(f"{name} has stopped" + (f", saved at step {step:,}" if step is not None else ""))
    else:
        kept = "no checkpoint was written"
        if step is not None:
            kept = f"the newest complete checkpoint is at step {step:,}; later steps are done again"
        how = "before it had saved" if state == "interrupted" else f"and is {state}"
        say(f"{name} has ended {how}" + (f": {kept}" if directory is not None else ""))
    say(f"go on with:\n  longspan resume {name}")
    return COMPLETE if state == "stopped" else CRASHED


def _newest(directory: RunDirectory) -> int | None:
    try:
        where = directory.load_settings().checkpoint.where
        return newest_step(open_store(where, directory.path))
    except LongspanError:
        return None
