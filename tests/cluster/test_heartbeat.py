"""Heartbeats: what a rank is at can be read from outside at any time, and learned from."""

import os
import time

from longspan.cluster.limits import EVENT, Limits, known_limits
from longspan.cluster.station import Station, process_state
from longspan.trainer import heartbeat
from longspan.trainer.heartbeat import HEARTBEAT, Heartbeat, learned, open_heartbeat, read_beat
from longspan.trainer.observe.events import EventLog
from longspan.trainer.recovery_settings import HangSettings

HANG = HangSettings(least=5, first=60, data=600)


class Clock:
    """Stands in for the module's clock."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)


def test_a_beat_says_what_a_rank_is_at(tmp_path, monkeypatch):
    monkeypatch.setenv(HEARTBEAT, str(tmp_path / "beat"))
    clock, beat = Clock(monkeypatch), open_heartbeat()
    for seconds in (0.0, 0.25, 0.0, 0.25):
        beat.computed(seconds)
    clock.now += 7
    beat.enter("step", 3)
    read = read_beat(tmp_path / "beat")
    assert (read.section, read.step, read.begun, read.own_s) == ("first_step", 3, 107.0, 0.25)
    assert read.longest["start_up"] == 7.0 and read.longest["step"] == 0


class Rank:
    """A rank that goes from section to section."""

    def __init__(self, monkeypatch, tmp_path, known=None):
        self.clock, self.path = Clock(monkeypatch), tmp_path / "beat"
        self.beat, self.limits = Heartbeat(self.path), Limits(HANG, known or {})

    def enter(self, section, after, stage=None):
        """Its new limit, in seconds."""
        self.clock.now += after
        self.beat.enter(section, stage=stage)
        self.limit, self.why = self.limits.of(self.read)
        return self.limit

    @property
    def read(self):
        return read_beat(self.path)


def test_the_first_step_of_a_stage_teaches_until_another_one_does(tmp_path, monkeypatch):
    rank = Rank(monkeypatch, tmp_path)
    assert rank.enter("open", 1, stage=0) == 600 and rank.why == "recovery.hang.data"
    assert rank.enter("step", 100) == 60 and rank.why == "recovery.hang.first"
    assert rank.enter("step", 30) == 300  # after one that compiled
    assert rank.why == "10 times the longest before"
    assert rank.enter("step", 2) == 20
    assert rank.enter("step", 0.1) == 20
    assert rank.enter("save", 3) == 60
    assert rank.enter("step", 1) == 30  # as before the save, which is none of it
    assert rank.enter("save", 0.1) == 60  # it may wait for storage, however quick one was
    assert rank.enter("evaluation", 20) == 600
    assert rank.enter("evaluation", 0.2) == 5 and rank.why == "recovery.hang.least"
    assert rank.enter("save", 0.2) == 200
    assert rank.enter("open", 1, stage=1) == 600  # another stage, whose data may be new
    assert rank.enter("step", 1) == 60
    assert rank.enter("evaluation", 1) == 600
    rank.enter("open", 1, stage=0)  # the run goes back
    assert rank.enter("step", 1) == 300 and rank.enter("step", 40) == 30


def test_a_stage_is_known_from_earlier_attempts(tmp_path, monkeypatch):
    rank = Rank(monkeypatch, tmp_path)
    for section, after, stage in (("open", 9, 0), ("canary", 7, None), ("step", 8, None),
                                  ("step", 30, None), ("save", 2, None), ("open", 1, 1),
                                  ("step", 1, None), ("step", 50, None)):  # fmt: skip
        rank.enter(section, after, stage)
    assert learned(rank.read) == {"first_step 1": 50}
    rank.enter("open", 1, 0)
    told = learned(rank.read)
    assert told == {"canary 0": 8, "first_step 0": 30, "step 0": 2}

    log = EventLog(tmp_path / "events.jsonl", 1)
    log.write(EVENT, ranks=2, seconds=told)
    log.write(EVENT, ranks=2, seconds={"step 0": 3.0})
    log.write(EVENT, ranks=1, seconds={"step 0": 99.0})  # fewer ranks take longer
    log.close()
    known = known_limits(HANG, tmp_path / "events.jsonl", 2).known
    assert known == {"canary 0": 8, "first_step 0": 30, "step 0": 3}
    again = Rank(monkeypatch, tmp_path, known)
    assert again.enter("open", 1, 0) == 600  # another node may have no cache
    assert again.enter("canary", 1) == 80
    assert again.enter("step", 1) == 300
    assert again.enter("step", 1) == 30
    again.enter("open", 1, 1)
    assert again.enter("step", 1) == 60  # what the other stage took says nothing


def test_what_compiles_may_do_so_in_each_attempt(tmp_path, monkeypatch):
    """Kernels that one attempt has compiled may be cached nowhere in the next."""
    quick = {"canary 0": 1.0, "first_step 0": 2.0, "step 0": 0.1, "evaluation 0": 3.0}
    rank = Rank(monkeypatch, tmp_path, quick)

    def limits():
        rank.enter("open", 1, 0)
        found = [rank.enter(section, 1) for section in ("canary", "step", "step", "evaluation")]
        why = rank.why
        rank.enter("step", 1)
        return found, why

    assert limits() == ([60, 60, 5, 60], "recovery.hang.first")
    # The run goes back to this stage in the same attempt.
    assert limits() == ([10, 20, 10, 30], "10 times the longest before")
    slow = Rank(monkeypatch, tmp_path, {"first_step 0": 50.0})
    slow.enter("open", 1, 0)
    assert slow.enter("step", 1) == 500


def test_one_slow_step_does_not_make_a_slow_rank(tmp_path):
    beat = Heartbeat(tmp_path / "beat")
    for seconds in (1.0,) * 9 + (3.0,):
        beat.computed(seconds)
    beat.enter("step", 10)
    assert abs(read_beat(tmp_path / "beat").own_s - 1.2) < 1e-9
    beat.enter("open", stage=1)
    assert read_beat(tmp_path / "beat").own_s == 0


def test_without_a_reader_nothing_is_written_and_a_beat_costs_next_to_nothing(tmp_path):
    Heartbeat().enter("step", 1)
    beat, begun = Heartbeat(tmp_path / "beat"), time.perf_counter()
    for step in range(2000):
        beat.enter("step", step)
    assert (time.perf_counter() - begun) / 2000 < 1e-3
    assert read_beat(tmp_path / "beat").step == 1999


def test_what_is_no_beat_is_none(tmp_path):
    assert read_beat(tmp_path / "missing") is None
    Heartbeat(tmp_path / "beat")
    whole = (tmp_path / "beat").read_bytes()
    assert read_beat(tmp_path / "beat") is not None
    for content in (b"", whole[:-1], bytes(len(whole)), bytes([9]) + whole[1:]):
        (tmp_path / "beat").write_bytes(content)
        assert read_beat(tmp_path / "beat") is None


def test_one_rank_tells_of_all_on_its_node(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    station = Station(tmp_path / "run", 2, "node")
    for rank, step in ((4, 7), (5, 8)):
        Heartbeat(station.beat_path(rank)).enter("step", step)
        station.started(rank, os.getpid())
    assert station.pids() == {4: os.getpid(), 5: os.getpid()}
    report = station.look(Limits(HANG), dumped=True)
    assert (report.node, report.step, report.overdue, report.dumped) == ("node", 8, (), True)
    time.sleep(0.02)
    station.started(6, os.getpid())  # it has not come to its first beat
    time.sleep(0.02)
    soon = Limits(HangSettings(least=0.01, first=0.01, data=0.01))
    late = {one.rank: one for one in station.look(soon, dumped=False).overdue}
    assert sorted(late) == [4, 5, 6] and late[4].state == "R"
    assert (late[4].section, late[6].section) == ("first_step", "start_up")
    assert late[4].why.startswith("recovery.hang.")
    assert process_state(2**22 + 1) == ""
    assert station.order() == "go on"
    station.give("stop")
    assert Station(tmp_path / "run", 2, "node").order() == "stop"
    assert Station(tmp_path / "run", 3, "node").order() == "go on"
    newer = Station(tmp_path / "run", 3, "node")
    station.close()
    assert newer.folder.is_dir() and not station.folder.exists()
    newer.close()
    assert not list((tmp_path).glob("longspan-*/*"))
