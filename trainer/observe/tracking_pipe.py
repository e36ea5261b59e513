"""TrackingPipe: messages for a process that tracks the run, which this one never waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...redact import redact
from .sink import Sink

# -P: a file of the user's folder must not stand in for a package of the same name.
TRACKER = (sys.executable, "-P", "-m", "longspan.trainer.observe.tracking_process")
MOST_PENDING_BYTES = 4 * 2**20
LAST_UPLOAD_S = 10.0
_KEPT = ("back", "mode", "id", "dir", "events")
"""Of a beginning: what the process works with, and shows nobody."""


class TrackingPipe:
    """Sends messages through a pipe that never blocks, and passes on what comes back.

    Args:
        name: Of the tracker, for messages.
        log: The file that the process may print to.
        console: Told what the process says, and once when tracking ends early.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, name: str, log: Path, console: Sink) -> None:
        self._name, self._log, self._console = name, log, console
        self._pending = self._answer = b""
        with log.open("ab") as file:
            # A session of its own: what stops the run must not cut off the last metrics.
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                TRACKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                bufsize=0,
                start_new_session=True,
            )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def send(self, kind: str, values: Mapping[str, Any]) -> None:
        """Send a message without its credentials; what the pipe does not take yet is kept."""
        if self._process is None:
            return
        # A login or a region that is one of a cluster's secrets may be a part of a path.
        kept = {name: values[name] for name in _KEPT if kind == "begin" and name in values}
        message = {"kind": kind, "values": {**redact(values), **kept}}
        self._pending += json.dumps(message, default=str).encode() + b"\n"
        self._flush()

    def finish(self, code: int) -> None:
        """Let the process end, which it gets a while for; then it goes on alone."""
        self.send("finish", {"code": code})
        deadline = time.monotonic() + LAST_UPLOAD_S
        while self._pending and self._process and time.monotonic() < deadline:
            time.sleep(0.05)
            self._flush()
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
            self._listen(process)
        except subprocess.TimeoutExpired:
            rest = (
                "the rest follows in the background; `longspan status` says what was not uploaded"
            )
            self._console.message(f"{self._name}: {rest}")
        self._process = None

    def _flush(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        self._listen(process)
        # Its children may keep the pipe open.
        if process.poll() is not None:
            self._give_up(f"its process ended; see {self._log}")
        try:
            while self._process and self._pending and (sent := process.stdin.write(self._pending)):
                self._pending = self._pending[sent:]
        except OSError:
            self._listen(process)
            self._give_up(f"its process ended; see {self._log}")
        if len(self._pending) > MOST_PENDING_BYTES:
            self._give_up(f"its process does not keep up; see {self._log}")

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what the process has to say, if anything."""
        assert process.stdout is not None
        with suppress(OSError):
            self._answer += process.stdout.read() or b""
        while b"\n" in self._answer:
            line, self._answer = self._answer.split(b"\n", 1)
            kind, _, text = line.decode("utf-8", "replace").partition(" ")
            if kind == "failed":
                self._give_up(text)
            elif kind == "warning":
                self._console.warning(f"{self._name}: {text}")
            else:
                self._console.message(f"{self._name}: {text}")

    def _give_up(self, reason: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
            self._console.warning(f"{self._name} is off, training goes on: {reason}")
