"""Asking a rank to stop: SIGINT or SIGTERM saves and stops, a second SIGINT ends at once."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers that a stop was asked for, until the loop reaches the end of a step."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Catch the stop signals of this process."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Schedulers and launchers send SIGTERM more than once; they follow it with SIGKILL.
        if self.requested and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True
