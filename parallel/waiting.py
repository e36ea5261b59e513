"""Waiting: how long a rank's computation stood still for tensors of other context ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .transport import Handle


@dataclass
class Waiting:
    """Exposed communication: transfers that computation did not hide.

    On a CPU the wall-clock time inside of waits. On a GPU a wait only holds up the stream, so an
    event is recorded before and after it, and the time between them is read later.

    Attributes:
        host_s: Seconds in waits on the host.
        marks: For each wait on a device the events before and after it.
    """

    host_s: float = 0.0
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def seconds(self) -> float:
        """All waits together; on a device it waits until the last one is over."""
        if self.marks:
            self.marks[-1][1].synchronize()
        return self.host_s + sum(before.elapsed_time(after) for before, after in self.marks) / 1e3


@dataclass(frozen=True)
class TimedHandle:
    """Another handle, whose wait is timed; see `Handle`.

    Attributes:
        handle: The transfer.
        waiting: Where the time is noted.
        cuda: Whether a stream waits and not the host.
    """

    handle: Handle
    waiting: Waiting
    cuda: bool

    def wait(self) -> list[Tensor]:
        """See `Handle`."""
        if not self.cuda:
            begun = time.perf_counter()
            received = self.handle.wait()
            self.waiting.host_s += time.perf_counter() - begun
            return received
        stream = torch.cuda.current_stream()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        received = self.handle.wait()
        after.record(stream)
        self.waiting.marks.append((before, after))
        return received
