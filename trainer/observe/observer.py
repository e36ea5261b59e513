"""What the training loop tells the world, in one object: events.jsonl, terminal and tracking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...redact import redact_text
from ..run_directory import RunDirectory
from ..settings import RunSettings
from .attempts import attempt_of_environment
from .events import EventLog
from .sink import Sink, StepMetrics
from .terminal import Terminal
from .tracking import start_tracking


class Observer(Sink):
    """Tells every sink in turn, and drops one that fails: training goes on.

    Without sinks it is silent: for all ranks but the first.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def run_started(self, info: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.run_started(info))

    def stage_started(self, name: str, index: int, info: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.stage_started(name, index, info))

    def step(self, metrics: StepMetrics) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.step(metrics))

    def observed(self, step: int, layers: Sequence[Mapping[str, float]]) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.observed(step, layers))

    def compared(self, step: int, values: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.compared(step, values))

    def alarm(self, name: str, step: int, text: str) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.alarm(name, step, text))

    def skipped(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.skipped(step, loss, grad_norm, reason))

    def rewound(self, step: int, to: int, sequences: int, reason: str) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.rewound(step, to, sequences, reason))

    def evaluated(self, name: str, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.evaluated(name, step, values, seconds))

    def saving(self, step: int, stall_s: float) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.saving(step, stall_s))

    def saved(self, step: int, path: Path, seconds: float) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.saved(step, path, seconds))

    def restored(self, step: int, path: Path, seconds: float) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.restored(step, path, seconds))

    def message(self, text: str) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.message(text))

    def warning(self, text: str) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.warning(text))

    def finished(self, summary: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.finished(summary))

    def stopped(self, step: int, reason: str) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.stopped(step, reason))

    def close(self) -> None:
        """See `Sink`."""
        self._tell(lambda sink: sink.close())

    def _tell(self, news: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                news(sink)
            # Whatever is wrong with a listener, hours of training weigh more.
            except Exception as error:
                self._sinks.remove(sink)
                with suppress(OSError, ValueError):
                    text = f"warning: {type(sink).__name__} failed and is off: {error!r}"
                    print(redact_text(text), file=sys.stderr, flush=True)


class EventSink(Sink):
    """Writes all news to events.jsonl."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def run_started(self, info: Mapping[str, Any]) -> None:
        """Event `run_started`."""
        self._log.write("run_started", **info)

    def stage_started(self, name: str, index: int, info: Mapping[str, Any]) -> None:
        """Event `stage_started`."""
        self._log.write("stage_started", **{**info, "stage": name, "index": index})

    def step(self, metrics: StepMetrics) -> None:
        """Event `step`."""
        self._log.write("step", **asdict(metrics))

    def observed(self, step: int, layers: Sequence[Mapping[str, float]]) -> None:
        """Event `attention`."""
        self._log.write("attention", step=step, layers=list(layers))

    def compared(self, step: int, values: Mapping[str, Any]) -> None:
        """Event `canary`."""
        self._log.write("canary", step=step, **values)

    def alarm(self, name: str, step: int, text: str) -> None:
        """Event `alarm`."""
        self._log.write("alarm", name=name, step=step, text=text)

    def skipped(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        """Event `skipped`."""
        self._log.write("skipped", step=step, loss=loss, grad_norm=grad_norm, reason=reason)

    def rewound(self, step: int, to: int, sequences: int, reason: str) -> None:
        """Event `rewound`."""
        fields = {"from": step, "to": to, "sequences": sequences, "reason": reason}
        self._log.write("rewound", **fields)

    def evaluated(self, name: str, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """Event `evaluated`."""
        self._log.write("evaluated", name=name, step=step, values=values, seconds=seconds)

    def saving(self, step: int, stall_s: float) -> None:
        """Event `saving`."""
        self._log.write("saving", step=step, stall_s=stall_s)

    def saved(self, step: int, path: Path, seconds: float) -> None:
        """Event `saved`."""
        self._log.write("saved", step=step, path=str(path), seconds=seconds)

    def restored(self, step: int, path: Path, seconds: float) -> None:
        """Event `restored`."""
        self._log.write("restored", step=step, path=str(path), seconds=seconds)

    def message(self, text: str) -> None:
        """Event `message`."""
        self._log.write("message", text=text)

    def warning(self, text: str) -> None:
        """Event `warning`."""
        self._log.write("warning", text=text)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Event `finished`."""
        self._log.write("finished", summary=summary)

    def stopped(self, step: int, reason: str) -> None:
        """Event `stopped`."""
        self._log.write("stopped", step=step, reason=reason)

    def close(self) -> None:
        """Close the file."""
        self._log.close()


def open_observer(directory: RunDirectory, run: RunSettings, rank: int) -> Observer:
    """The observer of a rank: complete on rank 0, silent elsewhere.

    Without a launcher that counts, opening it counts as an attempt. It never raises for a
    terminal, a disk or a tracker that does not work.
    """
    if rank != 0:
        return Observer()
    log = EventLog(directory.events, attempt_of_environment())
    terminal = Terminal(directory=str(directory))
    tracking = start_tracking(directory, run, log.attempt, terminal)
    return Observer([EventSink(log), terminal, *tracking])
