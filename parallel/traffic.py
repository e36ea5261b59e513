"""Traffic: what a rank sends to the other context ranks, message by message, and its waiting.

Collectives are counted as rings do them: of P equal parts every rank passes on P - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .transport import Handle, Incoming, Outgoing, Transport
from .waiting import TimedHandle, Waiting


@dataclass(frozen=True)
class Message:
    """One transfer.

    Attributes:
        kind: `send`, `all_gather` or `reduce_scatter`.
        size: Bytes that this rank sends.
        peer: The rank that it goes to; None for all.
    """

    kind: str
    size: int
    peer: int | None = None


@dataclass
class Traffic:
    """What was sent since the last look.

    Attributes:
        messages: In the order in which they were sent.
        waiting: For what came.
    """

    messages: list[Message] = field(default_factory=list)
    waiting: Waiting = field(default_factory=Waiting)

    def take(self) -> int:
        """Bytes sent since the last call."""
        size = sum(message.size for message in self.messages)
        self.messages.clear()
        return size

    def take_waiting(self) -> Waiting:
        """The waiting since the last call; its seconds can be asked for when the step is over."""
        waiting, self.waiting = self.waiting, Waiting()
        return waiting


class CountedTransport:
    """Another transport, whose messages are counted and waits timed; see `Transport`.

    Args:
        inner: What moves the tensors.
        traffic: Where messages are noted.
    """

    def __init__(self, inner: Transport, traffic: Traffic) -> None:
        self._inner, self.traffic = inner, traffic
        self.rank, self.size = inner.rank, inner.size

    def trade(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> Handle:
        """See `Transport`."""
        for peer, rows in sends:
            if rows.numel():
                self._note("send", rows.nbytes, peer)
        tensors = [*(rows for _, rows in sends), *(like for _, _, like in receives)]
        return self._timed(self._inner.trade(sends, receives), *tensors)

    def all_gather(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        self._note("all_gather", (self.size - 1) * tensor.nbytes)
        return self._timed(self._inner.all_gather(tensor), tensor)

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        self._note("reduce_scatter", (self.size - 1) * tensor[0].nbytes)
        return self._timed(self._inner.reduce_scatter(tensor), tensor)

    def _timed(self, handle: Handle, *tensors: Tensor) -> Handle:
        cuda = any(tensor.is_cuda for tensor in tensors)
        return TimedHandle(handle, self.traffic.waiting, cuda)

    def _note(self, kind: str, size: int, peer: int | None = None) -> None:
        self.traffic.messages.append(Message(kind, size, peer))
