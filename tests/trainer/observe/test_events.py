"""events.jsonl survives kills and full disks, and counts the attempts."""

import json
import os

from longspan.trainer.observe.events import EventLog, read_events


def test_events_carry_their_name_time_and_attempt(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("step", step=1, loss=2.5)
    log.write("saved", path=tmp_path)
    log.close()
    log.write("step", step=2)
    again = EventLog(path)
    again.write("step", step=2)
    first, saved, second = read_events(path)
    assert (first["event"], first["attempt"], first["loss"]) == ("step", 1, 2.5)
    assert saved["path"] == str(tmp_path) and saved["time"] >= first["time"] > 1e9
    assert (second["step"], second["attempt"]) == (2, 2)


def test_a_torn_last_line_is_skipped_and_swallows_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path).write("step", step=1)
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in read_events(path)] == [1]
    EventLog(path).write("step", step=2)
    assert [(event["step"], event["attempt"]) for event in read_events(path)] == [(1, 1), (2, 2)]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    EventLog(tmp_path / "events.jsonl").write("step", loss=float("nan"), more=[float("inf"), 1])
    line = (tmp_path / "events.jsonl").read_text()
    event = json.loads(line, parse_constant=lambda name: 1 / 0)
    assert event["loss"] is None and event["more"] == [None, 1]


def test_a_full_disk_warns_once_and_the_log_goes_on_after_it(tmp_path, monkeypatch, capsys):
    log = EventLog(tmp_path / "events.jsonl")
    real = os.write

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    log.write("step", step=1)
    log.write("step", step=2)
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:9]))
    log.write("step", step=3)
    monkeypatch.undo()
    log.write("step", step=4)
    assert [event["step"] for event in read_events(log.path)] == [4]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_log_that_cannot_be_opened_is_a_warning(tmp_path, capsys):
    log = EventLog(tmp_path / "nowhere" / "events.jsonl")
    log.write("step", step=1)
    assert "training goes on" in capsys.readouterr().err
