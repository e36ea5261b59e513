"""RedactedLog: what a process prints, line by line and without credentials, into a file."""

from __future__ import annotations

import io
import os
import threading
from contextlib import suppress

from ..redact import redact_text

_CHUNK = 2**16
_LATE_S = 5.0


class RedactedLog:
    """The writing end of a pipe, whose lines a thread copies into a file.

    Make it before the process starts, hand it over as its output, then `start`; when the process
    has ended, `close`. A process that outlives this one loses what it prints.

    Args:
        target: Where lines go, a descriptor; closed at the end if it is `owned`.
        owned: Whether `target` is this log's own.
    """

    def __init__(self, target: int, *, owned: bool = True) -> None:
        self._target = io.FileIO(target, "wb", closefd=owned)
        self._source, self._pipe = os.pipe()
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        """The descriptor to print to."""
        return self._pipe

    def start(self) -> None:
        """Begin to copy; the pipe now ends with the processes that have it."""
        os.close(self._pipe)
        self._pipe = -1
        self.follow()

    def follow(self) -> None:
        """Begin to copy, and keep the pipe: for a process that redacts its own output."""
        self._thread = threading.Thread(target=self._copy, name="redacted log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the last lines; not for long, as a child of the process may keep the pipe."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._thread is not None:
            self._thread.join(_LATE_S)

    def _copy(self) -> None:
        rest = b""
        while chunk := os.read(self._source, _CHUNK):
            lines, end, rest = (rest + chunk).rpartition(b"\n")
            if len(rest) >= _CHUNK:
                lines, end, rest = lines + end + rest, b"", b""
            self._write(lines + end)
        self._write(rest)
        os.close(self._source)
        with suppress(OSError):
            self._target.close()

    def _write(self, lines: bytes) -> None:
        # Whatever is wrong with the file, whoever prints must not wait for a full pipe.
        with suppress(Exception):
            left = redact_text(lines.decode("utf-8", "replace")).encode() if lines else b""
            while left:
                left = left[self._target.write(left) :]
