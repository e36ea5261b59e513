"""events.jsonl: what happened in a run, one JSON object a line, over all its attempts."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...redact import redact


class EventLog:
    """Appends events. A failing disk costs a warning, never the run.

    Every event has `event` (its name), `time` (unix seconds) and `attempt` (1, 2, ... for the
    launches of a run). Numbers that are not finite become null, which JSON has a word for.

    Args:
        path: The file; made when missing.
        attempt: The launch that the events belong to; left out: one more than in the file.
    """

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self.path = Path(path)
        self.attempt = attempt or 1 + newest_attempt(path)
        self._warned = False
        self._file: int | None = None
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o644)
            size = os.fstat(self._file).st_size
            # An attempt that was killed may have left half a line; it must not swallow ours.
            self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        except OSError as error:
            self._warn(error)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with a single write; never raises for a failing disk."""
        if self._file is None:
            return
        record = {"event": event, "time": time.time(), "attempt": self.attempt, **fields}
        line = json.dumps(_finite(redact(record)), default=str).encode() + b"\n"
        try:
            line = b"\n" + line if self._torn else line
            self._torn = True
            self._torn = os.write(self._file, line) < len(line)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file; later events are dropped."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            text = f"warning: {self.path} cannot be written ({error.strerror}); training goes on"
            print(text, file=sys.stderr, flush=True)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file in order; half-written lines are skipped, a missing file is empty."""
    try:
        with Path(path).open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event
    except OSError:
        return


def newest_attempt(path: Path) -> int:
    """The number of the last launch that a file tells of; 0 without one."""
    numbers = (event.get("attempt") for event in read_events(path))
    return max((number for number in numbers if isinstance(number, int)), default=0)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_finite(item) for item in value]
    return value
