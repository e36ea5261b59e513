"""Simulated ranks: threads of one process, so that tests reach many ranks without a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import TypeVar

import torch
from torch import Tensor

from .transport import Handle, Incoming, Outgoing

Result = TypeVar("Result")
# Sender, receiver, number of the message between the two.
Address = tuple[int, int, int]


class _Ended(Exception):
    """Another rank failed; its exception is the one to raise."""


@dataclass
class _Room:
    """The mail between the ranks, and how their run ends."""

    size: int
    mail: dict[Address, Tensor] = field(default_factory=dict)
    waiting: dict[int, Address] = field(default_factory=dict)
    running: int = 0
    failure: BaseException | None = None
    changed: Condition = field(default_factory=Condition)

    def send(self, address: Address, tensor: Tensor) -> None:
        with self.changed:
            self.mail[address] = tensor.detach().clone()
            self.changed.notify_all()

    def receive(self, rank: int, address: Address) -> Tensor:
        with self.changed:
            self.waiting[rank] = address
            self._find_deadlock()
            self.changed.wait_for(lambda: self.failure is not None or address in self.mail)
            del self.waiting[rank]
            if self.failure is not None:
                raise _Ended
            return self.mail.pop(address)

    def leave(self, failure: BaseException | None) -> None:
        """A rank's body has returned or raised."""
        with self.changed:
            self.running -= 1
            if failure is not None and not isinstance(failure, _Ended):
                self.failure = self.failure or failure
            self._find_deadlock()
            self.changed.notify_all()

    def _find_deadlock(self) -> None:
        stuck = not any(address in self.mail for address in self.waiting.values())
        if self.waiting and len(self.waiting) == self.running and stuck and self.failure is None:
            self.failure = RuntimeError(f"ranks wait for mail never sent: {self.waiting}")
            self.changed.notify_all()


@dataclass(frozen=True)
class _Underway:
    """What a rank waits for, and how it becomes what the call returns."""

    transport: SimulatedTransport
    sent: list[tuple[Tensor, int]]
    receives: list[tuple[Incoming, int]]
    finish: Callable[[list[Tensor]], list[Tensor]]

    def wait(self) -> list[Tensor]:
        for tensor, version in self.sent:
            assert tensor._version == version, "a tensor was written while it was being sent"
        received = []
        for (peer, length, like), number in self.receives:
            shape = length, *like.shape[1:]
            if 0 in shape:
                received.append(like.new_empty(shape))
                continue
            tensor = self.transport._receive(peer, number)
            assert tensor.shape == shape and tensor.dtype == like.dtype, (tensor.shape, shape)
            received.append(tensor)
        return self.finish(received)


@dataclass
class SimulatedTransport:
    """One simulated rank's end of the network; see `Transport`."""

    rank: int
    size: int
    room: _Room
    sent: Counter[int] = field(default_factory=Counter)
    expected: Counter[int] = field(default_factory=Counter)

    def trade(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> Handle:
        """See `Transport`."""
        return self._start(sends, receives, lambda received: received)

    def all_gather(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        ranks = range(self.size)
        sends = [Outgoing(rank, tensor[None]) for rank in ranks]
        receives = [Incoming(rank, 1, tensor[None]) for rank in ranks]
        return self._start(sends, receives, lambda received: [torch.cat(received)])

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        ranks = range(self.size)
        sends = [Outgoing(rank, tensor[rank, None]) for rank in ranks]
        receives = [Incoming(rank, 1, tensor) for rank in ranks]
        return self._start(sends, receives, lambda received: [torch.cat(received).sum(dim=0)])

    def _start(
        self,
        sends: Sequence[Outgoing],
        receives: Sequence[Incoming],
        finish: Callable[[list[Tensor]], list[Tensor]],
    ) -> Handle:
        for peer, rows in sends:
            if rows.numel():
                self.room.send((self.rank, peer, self.sent[peer]), rows)
                self.sent[peer] += 1
        coming = []
        for incoming in receives:
            coming.append((incoming, self.expected[incoming.peer]))
            if incoming.length and 0 not in incoming.like.shape[1:]:
                self.expected[incoming.peer] += 1
        return _Underway(self, [(rows, rows._version) for _, rows in sends], coming, finish)

    def _receive(self, sender: int, number: int) -> Tensor:
        return self.room.receive(self.rank, (sender, self.rank, number))


def simulate(size: int, body: Callable[[SimulatedTransport], Result]) -> list[Result]:
    """Runs `body` on every simulated rank and returns their results in rank order.

    Args:
        size: Ranks; each is a thread.
        body: One rank's work, backward passes included.

    Raises:
        BaseException: What the first failing rank raised; it ends the others as well.
        RuntimeError: Every rank waits for something that none has sent.
    """
    room = _Room(size, running=size)
    results: dict[int, Result] = {}

    def work(rank: int) -> None:
        failure = None
        try:
            # Backward passes then run in this thread, which may wait, not in a shared one.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = body(SimulatedTransport(rank, size, room))
        except BaseException as error:
            failure = error
        finally:
            room.leave(failure)

    threads = [Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if room.failure is not None:
        raise room.failure
    return [results[rank] for rank in range(size)]
