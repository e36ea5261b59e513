"""Output: what a run has printed, and what it goes on printing until it ends."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from ..errors import ClusterError, RunError
from ..redact import redact_text
from ..trainer.failure import COMPLETE, CRASHED, INTERRUPTED, STOPPED
from ..trainer.observe.events import read_events
from ..trainer.observe.sink import StepMetrics
from ..trainer.observe.terminal import Terminal
from ..trainer.run_directory import RunDirectory
from .jobs import Job, Jobs
from .registry import Record
from .standing import job_state, stand_alone
from .submission import cluster_of

_POLL_S = 0.5
_RETRY_S = 3.0
_RETRIES = 20
_STEP_EVERY_S = 10.0
_OF_RAY = re.compile(r"[\d-]{10} [\d:,]+\tINFO job_manager\.py:|Running entrypoint for job ")
"""What Ray says of itself before a driver begins."""

_CODES = {"complete": COMPLETE, "stopped": STOPPED, "interrupted": INTERRUPTED}


def show_logs(
    run: Record | RunDirectory, stream: TextIO, *, follow: bool = False, rank: int | None = None
) -> int:
    """Print what a run has said.

    Of a run on a cluster that is the output of its driver; of one on this machine, or whose job
    the cluster has forgotten, its events as a terminal shows them.

    Args:
        run: The run.
        stream: Where to print.
        follow: Go on until the run ends.
        rank: Print the log file of this rank instead.

    Returns:
        0; of a run that was followed to its end, the exit code of `longspan train`.

    Raises:
        RunError: There is nothing to print, and why.
        ClusterError: The cluster does not answer, and the run's folder is not visible.
    """
    if isinstance(run, Record) and run.cluster is not None:
        if rank is None:
            return _of_job(run, stream, follow)
        if not run.directory.is_run():
            what = f"{run.run_dir} is not visible from here, and the cluster keeps no logs of ranks"
            raise RunError(what, f"read logs/rank-{rank}.log there, on a machine that sees it")
    directory = run if isinstance(run, RunDirectory) else run.directory
    if not directory.is_run():
        raise directory.no_run()
    if rank is not None:
        return _of_rank(directory, rank, stream, follow)
    return _of_events(directory, stream, follow)


def _of_job(record: Record, stream: TextIO, follow: bool) -> int:
    standing = stand_alone(record)
    job = standing.job
    if job is None:
        if record.directory.is_run():
            print(f"note: {standing.note}; this is from its folder", file=sys.stderr)
            return _of_events(record.directory, stream, follow)
        fix = f"where {record.run_dir} is visible: longspan logs {record.run_dir}"
        raise ClusterError(f"{record.id}: {standing.note}", fix)
    jobs = Jobs(cluster_of(record))
    if not follow:
        lines = jobs.logs(job.id).splitlines(keepends=True)
        text = "".join(line for line in lines if not _OF_RAY.match(line))
        stream.write(redact_text(text))
        silent = standing.is_live and not text
        nothing = f"{record.id} ({standing.state}) has said nothing yet" if silent else ""
        for note in filter(None, (nothing, standing.note)):
            print(f"note: {note}", file=sys.stderr)
        return COMPLETE
    ended = _follow_job(jobs, job, stream)
    standing = stand_alone(record)
    state, note = standing.state, standing.note
    if state not in _CODES and ended is not None:
        state = job_state(ended)
    print(f"\n{record.id}: {state}" + (f": {note}" if note else ""), file=sys.stderr)
    return _CODES.get(state, (ended.exit_code if ended else None) or CRASHED)


def _follow_job(jobs: Jobs, job: Job, stream: TextIO) -> Job | None:
    """Print a job's output until it ends; a connection that breaks off is opened again."""
    printed, failed, again = 0, 0, False
    while True:
        try:
            current = jobs.get(job.id)
            failed = 0
            if current is None:
                return None
            if current.is_live and again:  # a quiet stream may be ended by whoever is in between
                time.sleep(_RETRY_S)
            again = True
            # A stream may end before the last words of the driver, so these are asked for then.
            parts = jobs.follow(job.id) if current.is_live else iter((jobs.logs(job.id),))
            for line in _whole_lines(parts, printed):
                printed += len(line)
                if not _OF_RAY.match(line):
                    stream.write(redact_text(line))
                    stream.flush()
            if not current.is_live:
                return current
        except ClusterError:
            failed += 1
            if failed > _RETRIES:
                raise
            time.sleep(_RETRY_S)


def _whole_lines(parts: Iterator[str], skip: int) -> Iterator[str]:
    """The lines of a text that comes in parts, without its first characters.

    A line is what is cleaned of credentials: half of one is not recognised.
    """
    rest = ""
    for part in parts:
        skipped = min(skip, len(part))
        skip -= skipped
        *lines, rest = (rest + part[skipped:]).split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


def _of_rank(directory: RunDirectory, rank: int, stream: TextIO, follow: bool) -> int:
    file = directory.logs / f"rank-{rank}.log"
    if not file.is_file():
        numbers = sorted(
            int(number)
            for found in directory.logs.glob("rank-*.log")
            if (number := found.stem.removeprefix("rank-")).isdigit()
        )
        has = (
            f"there are logs of ranks {', '.join(map(str, numbers))}"
            if numbers
            else ("it has no logs of ranks")
        )
        fix = f"{has}; without --rank the run's events are shown"
        raise RunError(f"{directory} has no log of rank {rank}", fix)
    for line in _lines(file, _alive(directory) if follow else lambda: False):
        stream.write(redact_text(line))
        stream.flush()
    if not follow:
        return COMPLETE
    replay = Replay(directory, io.StringIO())
    for event in read_events(directory.events):
        replay.see(event)
    return replay.code


def _of_events(directory: RunDirectory, stream: TextIO, follow: bool) -> int:
    replay = Replay(directory, stream)
    for line in _lines(directory.events, _alive(directory) if follow else lambda: False):
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                replay.see(event)
    replay.flush()
    logs = sorted(file.name for file in directory.logs.glob("rank-*.log"))
    if logs and not follow:
        shown = logs[0] if len(logs) == 1 else f"{logs[0]} to {logs[-1]}"
        print(f"ranks: {directory}/logs has {shown}; --rank N shows one", file=sys.stderr)
    return replay.code if follow else COMPLETE


def _alive(directory: RunDirectory) -> Callable[[], bool]:
    return lambda: directory.owner() is not None


def _lines(file: Path, alive: Callable[[], bool]) -> Iterator[str]:
    """The lines of a file, and those that are added as long as `alive` says so."""
    rest, at = b"", 0
    while True:
        # Asked before the read: what was written before the end is read in any case.
        more = alive()
        with suppress(FileNotFoundError), file.open("rb") as opened:
            opened.seek(at)
            while chunk := opened.read(1 << 20):
                at += len(chunk)
                *complete, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", "replace") + "\n" for line in complete)
        if not more:
            break
        time.sleep(_POLL_S)
    if rest:
        yield rest.decode("utf-8", "replace") + "\n"


class Replay:
    """Events of a run as a terminal would have shown them.

    Args:
        directory: The run's folder.
        stream: Where to print.
    """

    def __init__(self, directory: RunDirectory, stream: TextIO) -> None:
        self._time, self._shown_at = 0.0, -math.inf
        self._waiting: StepMetrics | None = None
        # Its own clock would leave out what passes quickly now, and took long then.
        clock = itertools.count(step=3600.0).__next__
        self._terminal = Terminal(str(directory), stream, live=False, clock=clock)
        self.code = CRASHED
        """The exit code of the newest attempt; of a crash until it has ended."""

    def see(self, event: Mapping[str, Any]) -> None:
        """Print one event, if a terminal shows it; one that is torn or strange is left out."""
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            self._time = float(event["time"])
            if event["event"] == "step":
                names = {part.name for part in fields(StepMetrics)} & event.keys()
                self._step(StepMetrics(**{name: event[name] for name in names}))
                return
            if event["event"] in ("ended", "stopped", "finished"):
                self.flush()
            self._see(str(event["event"]), event)

    def flush(self) -> None:
        """Print the newest step, if it is not there yet."""
        if self._waiting is not None:
            self._terminal.step(self._waiting)
            self._waiting, self._shown_at = None, self._time

    def _step(self, metrics: StepMetrics) -> None:
        self._waiting = metrics
        edge = metrics.stage_step in (1, metrics.stage_steps)
        if edge or self._time - self._shown_at >= _STEP_EVERY_S:
            self.flush()

    def _see(self, name: str, event: Mapping[str, Any]) -> None:
        out = self._terminal
        if name == "launched":
            self.code = CRASHED
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._time))
            out.message(f"attempt {event['attempt']}, {when}, ranks: {event.get('ranks', '?')}")
        elif name == "ended":
            self.code = int(event["code"])
            reason = f": {event['reason']}" if event.get("reason") else ""
            out.message(f"attempt {event['attempt']} ended: {event['how']}{reason}")
        elif name == "run_started":
            out.run_started(event)
        elif name == "stage_started":
            known = ("event", "time", "attempt", "stage", "index")
            info = {key: value for key, value in event.items() if key not in known}
            out.stage_started(event["stage"], event["index"], info)
        elif name == "canary":
            out.compared(event["step"], event)
        elif name == "alarm":
            out.alarm(event["name"], event["step"], event["text"])
        elif name == "skipped":
            out.skipped(event["step"], event["loss"], event["grad_norm"], event["reason"])
        elif name == "rewound":
            out.rewound(event["from"], event["to"], event["sequences"], event["reason"])
        elif name == "evaluated":
            out.evaluated(event["name"], event["step"], event["values"], event["seconds"])
        elif name == "saving":
            out.saving(event["step"], event["stall_s"])
        elif name == "saved":
            out.saved(event["step"], Path(event["path"]), event["seconds"])
        elif name in ("message", "warning"):
            getattr(out, name)(event["text"])
        elif name == "finished":
            out.finished(event["summary"])
        elif name == "stopped":
            out.stopped(event["step"], event["reason"])


def quiet_pipe() -> None:
    """Let `longspan logs RUN | head` end without a word."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
