"""What the launcher writes about its attempts, and what status makes of a run's folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from longspan.errors import RunError
from longspan.trainer import launch
from longspan.trainer.checkpoint.cursor import Cursor
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.manifest import MANIFEST, Manifest, marker_of
from longspan.trainer.failure import LAUNCHER_PID
from longspan.trainer.observe.attempts import ATTEMPT
from longspan.trainer.observe.events import EventLog, read_events
from longspan.trainer.run_directory import RunDirectory, create_or_open
from longspan.trainer.settings import RunSettings
from longspan.trainer.status import read_status, render_status
from support.short_run import short_run

WORKER = """
import os, signal, sys, time
from pathlib import Path
from longspan.errors import DataError
from longspan.trainer.failure import die_with_parent, record_failure

die_with_parent()
mode, run_dir, stop = sys.argv[1], Path(sys.argv[2]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
(run_dir / "attempt").write_text(os.environ["LONGSPAN_ATTEMPT"])
try:
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "user":
        raise DataError("corpus.txt is empty", "give a file with text")
    if mode == "port" and not (run_dir / "tried").exists():
        (run_dir / "tried").touch()
        raise RuntimeError("Address already in use")
    while mode == "wait" and not stop:
        time.sleep(0.01)
    sys.exit(75 if stop else 0)
except Exception as error:
    sys.exit(record_failure(run_dir, 0, error))
"""

LAUNCHER = """
import sys
from pathlib import Path
from longspan.trainer import launch
launch.gpu_count = lambda: 0
sys.exit(launch.resume(Path(sys.argv[-1]), sys.argv[1:-1]))
"""


def settings() -> RunSettings:
    return short_run(ranks=1)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without GPUs and without torchrun, whatever this one has."""
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", LAUNCHER_PID, ATTEMPT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return lambda mode: (sys.executable, str(script), mode)


@pytest.fixture
def directory(tmp_path):
    return create_or_open(tmp_path / "run", settings(), "tiny")


@pytest.fixture
def waiting(directory, worker):
    """A launcher in a process of its own, whose rank waits for a signal."""
    command = [sys.executable, "-c", LAUNCHER, *worker("wait"), str(directory.path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((directory.path / "attempt").exists)
    yield process
    process.kill()
    process.wait()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lines_of(directory):
    return [(e["event"], e["attempt"], e.get("how")) for e in read_events(directory.events)]


def test_the_launcher_writes_when_it_launched_and_how_that_ended(directory, worker):
    for attempt, mode in enumerate(("clean", "user", "kill"), 1):
        launch.train(settings(), "tiny", directory.path, worker(mode))
        assert (directory.path / "attempt").read_text() == str(attempt)
    assert lines_of(directory) == [
        line
        for attempt, how in enumerate(("complete", "failed", "failed"), 1)
        for line in (("launched", attempt, None), ("ended", attempt, how))
    ]
    ends = [event for event in read_events(directory.events) if event["event"] == "ended"]
    assert [event["code"] for event in ends] == [0, 2, 1] and "reason" not in ends[0]
    assert ends[1]["reason"] == "corpus.txt is empty" and "SIGKILL" in ends[2]["reason"]
    found = read_status(directory)
    assert found.state == "failed" and "SIGKILL" in found.reason
    assert "attempts: 3 (before: 1 complete, 1 failed)" in render_status(found)


def test_a_stolen_port_is_an_attempt_of_its_own(directory, worker):
    assert launch.train(settings(), "tiny", directory.path, worker("port")) == 0
    assert [how for _, _, how in lines_of(directory)][1::2] == ["failed", "complete"]


def test_under_torchrun_rank_0_writes_them(directory, monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda path: seen.append(os.environ[ATTEMPT]) or 75)
    monkeypatch.setitem(sys.modules, "longspan.trainer.worker", module)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(Path.cwd())
    assert launch.train(settings(), "tiny", directory.path) == 75
    assert lines_of(directory) == [("launched", 1, None), ("ended", 1, "stopped")]
    assert seen == ["1"] and ATTEMPT not in os.environ


def test_status_knows_who_works_on_a_run_and_how_it_was_left(directory, waiting):
    found = read_status(directory)
    assert found.state == "running" and found.owner.pid == waiting.pid
    assert f"running, process {waiting.pid} on {socket.gethostname()}" in render_status(found)
    waiting.send_signal(signal.SIGINT)
    waiting.wait(60)
    found = read_status(directory)
    assert (found.state, found.owner) == ("stopped", None)
    assert f"longspan resume {directory}" in render_status(found)


def test_a_run_whose_launcher_was_killed_is_not_running(directory, waiting):
    waiting.kill()
    waiting.wait()
    wait_for(lambda: read_status(directory).owner is None)
    found = read_status(directory)
    assert found.state == "lost" and "it ended without a word" in render_status(found)


def test_asking_for_the_owner_never_takes_the_lock(directory, monkeypatch):
    with directory.lock():
        assert directory.owner().host == socket.gethostname()
    assert directory.owner() is None  # this process lives, and holds no lock
    lock = directory.path / "run.lock"
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "since": 1.0}))
    monkeypatch.setattr("fcntl.flock", lambda *_: 1 / 0)
    assert directory.owner() is None
    lock.write_text('{"pid": ')
    assert directory.owner() is None


def test_status_shows_the_newest_position_and_its_age(directory):
    log = EventLog(directory.events)
    log.write("launched")
    log.write("run_started", steps=16)
    log.write("stage_started", stage="short", steps=8)
    step = {"stage": "short", "stage_steps": 8, "steps": 16, "step_s": 0.01, "loss": 2.5}
    for number in (1, 2, 3):
        time.sleep(0.02)
        log.write("step", **step, step=number, stage_step=number, tokens=1024 * number)
    manifest = Manifest(Cursor(step=2), {}, {"created": time.time()}).to_json()
    store = LocalStore(directory.checkpoints)
    folder = store.begin(2)
    store.write(folder, MANIFEST, [manifest])
    name = store.commit(folder, 2, marker_of(manifest))
    found = read_status(directory)
    shown = render_status(found)
    assert "  step 3 of 16, 3,072 tokens, loss 2.5000\n  stage short, step 3 of 8\n" in shown
    assert "last event: step, 0s ago" in shown and f"newest checkpoint: {name}, 0s ago" in shown
    values = found.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert (values["state"], values["step"], values["checkpoint"]) == ("lost", 3, name)
    log.write("restored", step=2, seconds=0.001)
    assert "  step 2 of 16\n  stage short\n" in render_status(read_status(directory))


def test_status_of_odd_folders(tmp_path, directory):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"holds no run|does not exist"):
            read_status(RunDirectory(path))
    assert "not started" in render_status(read_status(directory))
    nonsense = {"event": "step", "step": "x", "tokens": [], "loss": None, "time": "noon"}
    more = [{"event": "ended", "how": "melted", "attempt": {}}, {"event": None}, {}]
    directory.events.write_text("\n".join(map(json.dumps, [nonsense, *more])) + "\nhalf {")
    assert "failed" in render_status(read_status(directory))
