"""The process that tracks a run: JSON lines in, lines about the tracking out.

It can hang, fail or be killed; the run that feeds it goes on. When its input ends without a
`finish`, the run was killed, and it is marked as failed.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, Protocol

from ...redact import redact_text
from ..redacted_log import RedactedLog

# Beyond these the reader waits, the pipe fills, and the run gives the tracking up.
_MOST_MESSAGES = 50_000
_LAST_S = 900.0
_RESTARTS = 3
_PAUSE_S = 1.0


class Back(Protocol):
    """What keeps a run's metrics; any of its methods may raise anything."""

    about: str
    """Where the metrics are, in words."""

    def log(self, row: dict[str, Any]) -> None:
        """Keep a row: numbers by name, among them `step` and `attempt`, and perhaps tables."""

    def summary(self, values: dict[str, Any]) -> None:
        """Keep values of the run as a whole."""

    def table(self, values: dict[str, Any]) -> None:
        """Keep `columns` and `rows` under `name`, for the point of the run that `at` says."""

    def artifact(self, values: dict[str, Any]) -> None:
        """Refer to the files at `path` as `name` of a `type`, with `aliases` and `metadata`."""

    def back_to(self, values: dict[str, Any]) -> None:
        """The run goes on from `step`: what was kept of later steps is computed again."""

    def finish(self, code: int) -> str:
        """End with 0, or 1 for a run that is not complete. Returns what is left to do."""
        ...


Messages = queue.Queue[tuple[str, dict[str, Any]]]
Start = Callable[[dict[str, Any]], Back]


def main() -> int:
    """Run until the input ends."""
    # wandb prints, by itself and by the process that it starts: our answers alone go to stdout.
    answers, sys.stdout = sys.stdout, sys.stderr
    _redact_errors()
    messages: Messages = queue.Queue(_MOST_MESSAGES)
    # Read ahead of wandb, so that the pipe stays empty while it starts or waits for the network.
    threading.Thread(target=_read, args=(sys.stdin, messages), daemon=True).start()
    kind, begin = messages.get()
    if kind != "begin":
        return 1
    try:
        return _follow(_starter(begin.pop("back")), begin, messages, answers)
    except Exception as error:
        return _answer(answers, "failed", _one_line(error)) or 1


def _redact_errors() -> None:
    """What is printed to stderr, also by children, is redacted to the last line."""
    target = os.dup(2)
    log = RedactedLog(os.dup(target))
    os.dup2(log.fileno(), 2)
    log.follow()

    def end() -> None:
        os.dup2(target, 2)
        log.close()

    atexit.register(end)  # before wandb registers its own, which then comes first


def _starter(name: str) -> Start:
    if name == "tensorboard":
        from .tensorboard_back import TensorBoardBack

        return TensorBoardBack
    from .wandb_back import WandbBack

    return WandbBack


def _read(stream: IO[str], messages: Messages) -> None:
    for line in stream:
        try:
            message = json.loads(line)
        except ValueError:
            break
        messages.put((message["kind"], message["values"]))
    threading.Thread(target=_end_in_time, daemon=True).start()
    messages.put(("finish", {"code": 1}))


def _follow(start: Start, begin: dict[str, Any], messages: Messages, answers: IO[str]) -> int:
    """Pass messages on; where the back end breaks, start it again a few times."""
    back, left = start(begin), _RESTARTS
    _answer(answers, "started", back.about)
    while True:
        kind, values = messages.get()
        try:
            if kind == "finish":
                if rest := back.finish(values["code"]):
                    _answer(answers, "finished", rest)
                return 0
            getattr(back, kind)(values)
        except Exception as error:
            if not left or kind == "finish":
                raise
            left -= 1
            _answer(answers, "warning", f"started again, as it failed: {_one_line(error)}")
            time.sleep(_PAUSE_S)
            back = start(begin)
            with suppress(Exception):  # a message that breaks it must not break it for ever
                getattr(back, kind)(values)


def _end_in_time() -> None:
    """End whatever hangs long after the run, with all that it started."""
    time.sleep(_LAST_S)
    with suppress(Exception):
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
    os._exit(1)


def _answer(stream: IO[str], kind: str, text: str) -> None:
    try:
        print(kind, text, file=stream, flush=True)
    except OSError:
        # The run is gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: BaseException) -> str:
    return redact_text(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    sys.exit(main())
