"""Status: where a run is, whether anything works on it, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LongspanError
from .checkpoint.files import CheckpointFiles
from .checkpoint.manifest import read_manifest
from .checkpoint.store import open_store
from .observe.events import read_events
from .observe.goodput import BUCKETS, Goodput, measure_goodput
from .observe.summary import goodput_line, table
from .observe.terminal import duration
from .observe.wandb_folders import sync_command
from .run_directory import RunDirectory
from .run_lock import Owner

_STATES = {
    "new": "not started",
    "running": "running",
    "complete": "complete",
    "stopped": "stopped, and saved",
    "interrupted": "stopped at once",
    "failed": "failed",
    "lost": "not running; it ended without a word (killed, or its machine went down)",
}


@dataclass
class Position:
    """Where a run stands by its newest events; None is what they do not say.

    Attributes:
        stage: The stage's name.
        stage_step: Steps done in it.
        stage_steps: Steps that it has.
        step: Steps done in the run.
        steps: Steps of the run.
        tokens: Tokens trained on.
        loss: Of the newest step, in nats.
        event: The name of the newest event.
        event_time: Its time, in unix seconds.
    """

    stage: str | None = None
    stage_step: int | None = None
    stage_steps: int | None = None
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    event: str | None = None
    event_time: float | None = None

    def see(self, event: Mapping[str, Any]) -> None:
        """Take in the next event."""
        name, when = event.get("event"), _number(event.get("time"))
        self.event = str(name)
        self.event_time = self.event_time if when is None else float(when)
        stage, step, steps = event.get("stage"), _whole(event, "step"), _whole(event, "steps")
        if name == "step":
            self.stage, self.step, self.steps = str(stage), step, steps
            self.stage_step = _whole(event, "stage_step")
            self.stage_steps = _whole(event, "stage_steps")
            self.tokens, self.loss = _whole(event, "tokens"), _number(event.get("loss"))
        elif name == "run_started":
            self.steps = steps
        elif name == "stage_started" and stage != self.stage:
            self.stage, self.stage_steps, self.stage_step = str(stage), steps, None
        elif name == "restored" and step != self.step:
            self.step = step
            self.stage_step = self.tokens = self.loss = None


@dataclass(frozen=True)
class Status:
    """A run as `longspan status` shows it.

    Attributes:
        directory: As a user would type it.
        state: new, running, complete, stopped, interrupted, failed or lost.
        reason: What it failed of, in one line.
        owner: The process that works on it.
        position: Where it stands.
        checkpoint: The newest complete checkpoint's name.
        checkpoint_time: When it was completed, in unix seconds.
        goodput: Where its time went, up to the newest event.
        now: When this was found out, in unix seconds.
        sync: What uploads the metrics that Weights & Biases lacks; None where it lacks none.
    """

    directory: str
    state: str
    reason: str
    owner: Owner | None
    position: Position
    checkpoint: str | None
    checkpoint_time: float | None
    goodput: Goodput
    now: float
    sync: str | None = None

    @property
    def words(self) -> str:
        """The state for people; a run that was stopped before it had trained has saved nothing."""
        attempts = self.goodput.attempts
        trained = any(attempt.steps for attempt in attempts[-1:])
        if self.state == "stopped" and self.checkpoint is None and not trained:
            return "stopped before it had a checkpoint"
        return _STATES[self.state]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; ages are in seconds."""
        return {
            "run_dir": self.directory,
            "state": self.state,
            "reason": self.reason or None,
            "owner": None if self.owner is None else asdict(self.owner),
            **asdict(self.position),
            "event_age_s": self.age(self.position.event_time),
            "checkpoint": self.checkpoint,
            "checkpoint_age_s": self.age(self.checkpoint_time),
            "sync": self.sync,
            "goodput": self.goodput.as_dict()
            | {"attempts": [asdict(attempt) for attempt in self.goodput.attempts]},
        }

    def age(self, then: float | None) -> float | None:
        """Seconds since a time; 0 for one that a wrong clock put into the future."""
        return None if then is None else max(0.0, self.now - then)


def read_status(directory: RunDirectory) -> Status:
    """Find out about a run; nothing in it is changed.

    Raises:
        RunError: The folder holds no run.
    """
    if not directory.is_run():
        raise directory.no_run()
    # In this order: a run that ends in between is told of as it was.
    owner, complete, position = directory.owner(), directory.is_complete(), Position()
    running = owner is not None and not complete
    goodput = measure_goodput(_watched(directory, position), running)
    last = goodput.attempts[-1] if goodput.attempts else None
    state = "complete" if complete else "running" if running else "new"
    if state == "new" and last is not None:
        state = last.end or "lost"
    newest, saved = _newest(directory)
    return Status(
        directory=str(directory),
        state=state if state in _STATES else "failed",
        reason=last.reason if last is not None and state == "failed" else "",
        owner=owner if running else None,
        position=position,
        checkpoint=newest,
        checkpoint_time=saved,
        goodput=goodput,
        now=time.time(),
        sync=None if running else sync_command(directory.path),
    )


def _newest(directory: RunDirectory) -> tuple[str | None, float | None]:
    """Name and time of the newest checkpoint, as far as they can be known."""
    try:
        store = open_store(directory.load_settings().checkpoint.where, directory.path)
        names = store.committed()
        if not names:
            return None, None
    except LongspanError:
        return None, None
    try:
        return names[-1], read_manifest(CheckpointFiles(store, names[-1])).info.get("created")
    except LongspanError:
        return names[-1], None


def _watched(directory: RunDirectory, position: Position) -> Iterator[Mapping[str, Any]]:
    for event in read_events(directory.events):
        position.see(event)
        yield event


def render_status(status: Status) -> str:
    """A status as lines of text."""
    words = status.words
    if status.owner is not None:
        since = duration(status.age(status.owner.since) or 0.0)
        words += f", process {status.owner.pid} on {status.owner.host} since {since}"
    if status.reason:
        words += f": {status.reason}"
    lines = [f"{status.directory}: {words}", *(f"  {line}" for line in _position_lines(status))]
    if status.checkpoint is not None:
        age = duration(status.age(status.checkpoint_time) or 0.0)
        lines.append(f"  newest checkpoint: {status.checkpoint}, {age} ago")
    elif status.goodput.attempts:
        lines.append("  no checkpoint yet")
    lines += _attempt_lines(status.goodput) + _goodput_table(status.goodput)
    if status.sync is not None:
        lines += ["metrics that are not on Weights & Biases yet; upload them with:"]
        lines += [f"  {status.sync}"]
    if status.state not in ("running", "complete"):
        lines += ["go on with:", f"  longspan resume {status.directory}"]
    return "\n".join(lines)


def _position_lines(status: Status) -> list[str]:
    at, lines = status.position, []
    if at.step is not None:
        parts = [f"step {at.step:,}" + (f" of {at.steps:,}" if at.steps is not None else "")]
        parts += [f"{at.tokens:,} tokens"] if at.tokens is not None else []
        parts += [f"loss {at.loss:.4f}"] if at.loss is not None else []
        lines.append(", ".join(parts))
    if at.stage is not None:
        of = f" of {at.stage_steps:,}" if at.stage_steps is not None else ""
        here = f", step {at.stage_step:,}{of}" if at.stage_step is not None else ""
        lines.append(f"stage {at.stage}{here}")
    if (age := status.age(at.event_time)) is not None:
        lines.append(f"last event: {at.event}, {duration(age)} ago")
    return lines


def _attempt_lines(goodput: Goodput) -> list[str]:
    ends: dict[str, int] = {}
    for attempt in goodput.attempts[:-1]:
        end = attempt.end or "lost"
        ends[end] = ends.get(end, 0) + 1
    if not goodput.attempts:
        return []
    before = ", ".join(f"{count} {end}" for end, count in ends.items())
    return [f"  attempts: {len(goodput.attempts)}" + (f" (before: {before})" if before else "")]


def _goodput_table(goodput: Goodput) -> list[str]:
    line = goodput_line(goodput.share, goodput.wall_s, goodput.seconds)
    if not line:
        return []
    spent = [(name, part) for name, part in goodput.seconds.items() if round(part, 1)]
    rows = [
        (name.replace("_", "-"), f"{part:,.1f}", f"{part / goodput.wall_s:.1%}", BUCKETS[name])
        for name, part in sorted(spent, key=lambda item: (item[0] != "productive", -item[1]))
    ]
    rows.append(("wall", f"{goodput.wall_s:,.1f}", "100.0%", "from the first event to the last"))
    body = table(("", "seconds", "share"), [row[:3] for row in rows])
    words = ["", *(row[3] for row in rows)]
    return [f"  {line}", *(f"{a}  {b}".rstrip() for a, b in zip(body, words, strict=True))]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _whole(event: Mapping[str, Any], key: str) -> int | None:
    value = event.get(key)
    return value if isinstance(value, int) else None
