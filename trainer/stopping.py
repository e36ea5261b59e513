"""Asking a rank to stop or to save: SIGINT and SIGTERM, SIGUSR1; a second stop ends at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE_SIGNAL = signal.SIGUSR1
"""Asks for a checkpoint; launchers start ranks with it blocked, as they cannot listen at once."""

_REPEAT_S = 5.0


class StopRequest:
    """Remembers what was asked for, until the loop reaches the end of a step."""

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._save = False

    def listen(self) -> None:
        """Catch the signals of this process, also those that came while it started."""
        for number in _SIGNALS:
            signal.signal(number, self._on_stop)
        signal.signal(SAVE_SIGNAL, self._on_save)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE_SIGNAL})

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last time."""
        if not self._save:
            return False
        self._save = False
        return True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # Schedulers and launchers send SIGTERM to all processes, and then again to their own.
        repeated = number == signal.SIGTERM and time.monotonic() - self._first < _REPEAT_S
        if self.requested and not repeated:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.requested:
            self.requested, self._first = True, time.monotonic()

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
