"""How many bytes an exchange has on one simulated rank, at any time; runs of `traced.Work`."""

from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import NamedTuple

import torch
from longspan.parallel import method, shards
from longspan.parallel.simulation import simulate
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live:
    """Memory of tensors of numbers that live, and the most bytes that it had; no plans."""

    def __init__(self):
        self.storages, self.most = {}, 0

    def note(self, result, size=None):
        """Notes tensors, and what lives now; those that were known keep their size."""
        self.storages = {key: x for key, x in self.storages.items() if not x[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point():
                storage = x.untyped_storage()
                of = storage.nbytes() if size is None else size
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), of))
        self.most = max(self.most, sum(size for _, size in self.storages.values()))


class Watch(TorchDispatchMode):
    """Notes what every operation of this thread makes, and what it receives.

    What attention makes inside of itself does not count, only its results do.
    """

    def __init__(self):
        super().__init__()
        self.made, self.received, self.looks = Live(), Live(), True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.looks:
            self.made.note(result)
        return result

    @contextmanager
    def away(self):
        """Notes nothing."""
        self.looks = False
        yield
        self.looks = True

    def take(self):
        """The most bytes since the last call: of all that was made, of all that was received."""
        found = Peak(self.made.most, self.received.most)
        self.made.most = self.received.most = 0
        return found


class Peak(NamedTuple):
    """Bytes; what was received is a part of what was made."""

    made: int
    received: int


@dataclass
class Watched:
    """A transport whose receiving tensors are there from the call on, as on a real network."""

    inner: object
    watch: Watch

    def __post_init__(self):
        self.rank, self.size = self.inner.rank, self.inner.size

    def trade(self, sends, receives):
        """See `Transport`."""
        rooms = [like.new_empty(length, *like.shape[1:]) for _, length, like in receives]
        return self._start(rooms, sends, lambda: self.inner.trade(sends, receives))

    def all_gather(self, tensor):
        """See `Transport`."""
        rooms = [tensor.new_empty(self.size, *tensor.shape)]
        return self._start(rooms, tensor, lambda: self.inner.all_gather(tensor))

    def reduce_scatter(self, tensor):
        """See `Transport`."""
        rooms = [torch.empty_like(tensor[0])]
        return self._start(rooms, tensor, lambda: self.inner.reduce_scatter(tensor))

    def _start(self, rooms, sent, start):
        self.watch.received.note(rooms)
        with self.watch.away():
            return _Filling(rooms, sent, start(), self.watch)


@dataclass
class _Filling:
    """Holds what is sent until all is there."""

    rooms: list
    sent: object
    handle: object
    watch: Watch

    def wait(self):
        """See `Handle`."""
        with self.watch.away():
            for room, came in zip(self.rooms, self.handle.wait(), strict=True):
                room.copy_(came)
        self.sent = self.handle = None
        return self.rooms


WATCHES = {}
"""Of the simulated ranks, by thread."""


def peaks(monkeypatch, kind, how, given):
    """The peaks of each simulated rank, forward and backward."""

    def unseen(attend):
        def attended(*args, **kwargs):
            watch = WATCHES[get_ident()]
            with watch.away():
                result = attend(*args, **kwargs)
            watch.made.note(result)
            return result

        return attended

    for module in (method, shards):
        for name in ("attend", "attend_backward"):
            monkeypatch.setattr(module, name, unseen(getattr(module, name)))

    def on_rank(transport):
        watch = WATCHES[get_ident()] = Watch()
        with watch:
            back = given.start(Watched(transport, watch), kind, how)
            forward = watch.take()
            back()
            return forward, watch.take()

    return simulate(given.layout.ranks, on_rank)
