"""Voice: what the driver says to the user; what Ray says goes to a file of the run instead."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from ..redact import redact_text
from ..trainer.redacted_log import RedactedLog

RAY_LOG = "ray.log"
_MOST_BYTES = 1 << 20


class Voice:
    """Writes to where stdout and stderr led when it was made."""

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._out, self._err = os.dup(1), os.dup(2)
        self._log: RedactedLog | None = None

    def hush(self, logs: Path) -> None:
        """From now on whatever else this process prints goes to a file, without credentials."""
        file = os.open(logs / RAY_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with suppress(OSError):  # one of an older version
            os.fchmod(file, 0o600)
        self._log = RedactedLog(file)
        os.dup2(self._log.fileno(), 1)
        os.dup2(self._log.fileno(), 2)
        self._log.follow()

    def close(self) -> None:
        """Write what is left of that, and print as before."""
        if (log := self._log) is None:
            return
        self._log = None
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._out, 1)
        os.dup2(self._err, 2)
        log.close()

    def say(self, text: str) -> None:
        """A line for the user."""
        self._write(self._out, f"{redact_text(text)}\n".encode())

    def complain(self, text: str) -> None:
        """A line on stderr."""
        self._write(self._err, f"{redact_text(text)}\n".encode())

    def pass_on(self, content: bytes) -> None:
        """What rank 0 printed, as it is."""
        self._write(self._out, content)

    def _write(self, where: int, content: bytes) -> None:
        with suppress(OSError):  # a reader that went away must not end the run
            while content:
                content = content[os.write(where, content) :]


class Tail:
    """Passes on what is appended to a file.

    Args:
        path: The file; it may be missing yet.
        voice: Who says it.
    """

    def __init__(self, path: Path, voice: Voice) -> None:
        self._path, self._voice = path, voice
        self._at = path.stat().st_size if path.exists() else 0

    def follow(self) -> None:
        """Pass on what is new."""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self._at)
            content = file.read(_MOST_BYTES)
            self._at += len(content)
            if content:
                self._voice.pass_on(content)
