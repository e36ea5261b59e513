"""Heartbeats: what a rank is at can be read from outside at any time, and learned from."""

import os
import time

from longspan.cluster.station import Station, limit_of, process_state
from longspan.trainer import heartbeat
from longspan.trainer.heartbeat import HEARTBEAT, Heartbeat, open_heartbeat, read_beat


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
    assert (read.section, read.step, read.begun, read.own_s) == ("step", 3, 107.0, 0.25)
    assert not read.warm and read.longest["start_up"] == 7.0


def test_the_first_step_of_a_stage_teaches_until_another_one_does(tmp_path, monkeypatch):
    clock, beat = Clock(monkeypatch), Heartbeat(tmp_path / "beat")

    def enter(section, after):
        clock.now += after
        beat.enter(section)
        return read_beat(tmp_path / "beat")

    def limit(read):
        return limit_of(read, 5.0, 60.0)

    assert limit(enter("open", 1)) == 60
    assert limit(enter("step", 1)) == 60
    assert limit(enter("step", 30)) == 300  # after one that compiled
    assert limit(enter("step", 2)) == 20
    assert limit(enter("step", 0.1)) == 20
    assert limit(enter("save", 3)) == 60
    assert limit(enter("step", 1)) == 30  # as before the save, which is none of it
    assert limit(enter("save", 0.1)) == 10
    enter("open", 1)
    assert limit(enter("save", 1)) == 60  # another stage, of which nothing is known


def test_one_slow_step_does_not_make_a_slow_rank(tmp_path):
    beat = Heartbeat(tmp_path / "beat")
    for seconds in (1.0,) * 9 + (3.0,):
        beat.computed(seconds)
    beat.enter("step", 10)
    assert abs(read_beat(tmp_path / "beat").own_s - 1.2) < 1e-9
    beat.enter("open")
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
    report = station.look(floor=60, first=60, dumped=True)
    assert (report.node, report.step, report.overdue, report.dumped) == ("node", 8, (), True)
    time.sleep(0.02)
    station.started(6, os.getpid())  # it has not come to its first beat
    time.sleep(0.02)
    late = {one.rank: one for one in station.look(0.01, 0.01, dumped=False).overdue}
    assert sorted(late) == [4, 5, 6] and late[4].state == "R"
    assert (late[4].section, late[6].section) == ("step", "start_up")
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
