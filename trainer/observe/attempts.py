"""Attempts: what the launcher adds to events.jsonl, before the ranks begin and after they end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..failure import COMPLETE, INTERRUPTED, STOPPED, Failure
from .events import EventLog

ATTEMPT = "LONGSPAN_ATTEMPT"
"""The environment variable that tells the ranks the number of their attempt."""

_HOW = {COMPLETE: "complete", STOPPED: "stopped", INTERRUPTED: "interrupted"}


def queued(events: Path, **fields: Any) -> int:
    """Write that an attempt waits for machines.

    Returns:
        Its number, for `launched`.
    """
    return _first_word(events, "queued", fields)


def launched(events: Path, attempt: int | None = None, **fields: Any) -> int:
    """Write that ranks are about to start.

    Args:
        events: The run's events.jsonl.
        attempt: The number of an attempt that was queued; None: a new one.
        fields: More to write.

    Returns:
        The number of the attempt, for the ranks and for `ended`.
    """
    return _first_word(events, "launched", {"pid": os.getpid(), **fields}, attempt)


def _first_word(
    events: Path, event: str, fields: dict[str, Any], attempt: int | None = None
) -> int:
    log = EventLog(events, attempt)
    log.write(event, **fields)
    log.close()
    return log.attempt


def ended(events: Path, attempt: int, code: int, failure: Failure | None = None) -> None:
    """Write how the ranks of an attempt ended; none of them writes any more."""
    log = EventLog(events, attempt)
    how = _HOW.get(code, "failed")
    reason = failure.message.partition("\n")[0] if failure and how == "failed" else ""
    log.write("ended", code=code, how=how, **({"reason": reason} if reason else {}))
    log.close()


def attempt_of_environment() -> int | None:
    """The attempt that the launcher gave this rank; None without a launcher that counts."""
    number = os.environ.get(ATTEMPT, "")
    return int(number) if number.isdigit() else None


@contextmanager
def attempt_in_environment(number: int) -> Iterator[None]:
    """Tell a rank that works in this process the number of its attempt."""
    os.environ[ATTEMPT] = str(number)
    try:
        yield
    finally:
        del os.environ[ATTEMPT]
