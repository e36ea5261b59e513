"""OwnTime: how long a rank computes in a step before it meets the others in its gradients' sums."""

from __future__ import annotations

import time
from collections import deque

import torch


class OwnTime:
    """Times the part of a step that ranks do not wait for each other in; no wait of its own.

    On a GPU, events are recorded, and read once the device is known to be past them.

    Args:
        device: What the rank computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._begun, self._computes = 0.0, 0.0, False
        # The device may be a step behind.
        self._marks = deque[tuple[torch.cuda.Event, torch.cuda.Event]](maxlen=4)

    def begin(self) -> None:
        """The rank begins to compute."""
        self._computes = True
        if not self._cuda:
            self._begun = time.perf_counter()
            return
        self._marks.append((_event(), _event()))
        self._marks[-1][0].record()

    def meet(self) -> None:
        """The rank is through, and meets the others; what is no step's is not counted."""
        computes, self._computes = self._computes, False
        if computes and self._cuda:
            self._marks[-1][1].record()
        elif computes:
            self._seconds = time.perf_counter() - self._begun

    def seconds(self) -> float:
        """Of the newest step whose time is known; 0 before one is."""
        while self._marks and self._marks[0][1].query():
            first, last = self._marks.popleft()
            self._seconds = first.elapsed_time(last) / 1e3
        return self._seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
