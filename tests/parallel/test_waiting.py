"""Waits are timed, and nothing else is."""

from dataclasses import dataclass

import pytest
import torch
from longspan.parallel import waiting
from longspan.parallel.traffic import CountedTransport, Traffic
from longspan.parallel.transport import Incoming, Outgoing

TRANSFER_S, WORK_S = 2.0, 5.0


@dataclass
class Clock:
    """Time that passes when it is told to, and a transport whose transfers take some."""

    now: float = 0.0
    rank: int = 0
    size: int = 2

    def perf_counter(self):
        return self.now

    def wait(self):
        self.now += TRANSFER_S
        return [torch.ones(3)]

    def start(self, *_):
        return self

    trade = all_gather = reduce_scatter = start


@pytest.mark.parametrize("kind", ["trade", "all_gather", "reduce_scatter"])
def test_only_the_time_inside_of_waits_counts(monkeypatch, kind):
    clock, traffic, rows = Clock(), Traffic(), torch.ones(2, 3)
    monkeypatch.setattr(waiting, "time", clock)
    given = ([Outgoing(1, rows)], [Incoming(1, 2, rows)]) if kind == "trade" else (rows,)
    for _ in range(3):
        handle = getattr(CountedTransport(clock, traffic), kind)(*given)
        clock.now += WORK_S
        (received,) = handle.wait()
        assert torch.equal(received, torch.ones(3))
    assert traffic.take_waiting().seconds() == 3 * TRANSFER_S
    assert traffic.take_waiting().seconds() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams wait on a GPU only")
def test_on_a_gpu_the_stream_s_time_is_read_later(monkeypatch):
    class Slow:
        def wait(self):
            torch.cuda._sleep(10_000_000)
            return []

    found = waiting.Waiting()
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    waiting.TimedHandle(Slow(), found, cuda=True).wait()
    assert found.host_s == 0 and len(found.marks) == 1
    assert found.seconds() > 0
