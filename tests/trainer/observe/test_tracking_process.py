"""The process that tracks: a wandb that is slow, hangs, breaks or dies; a server that is away."""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest
from longspan.errors import RunError
from longspan.trainer.observe import tracking_pipe, tracking_process, wandb_account
from longspan.trainer.observe.tracked_export import track_export
from longspan.trainer.observe.tracking import run_id, start_tracking
from longspan.trainer.observe.wandb_folders import sync_command
from longspan.trainer.run_directory import create_or_open
from longspan.trainer.settings import TrackingSettings
from support.fake_wandb import CODE
from support.short_run import short_run
from support.tracked import Console, inspected, metrics, without_set_up

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    without_set_up(tmp_path, monkeypatch)


@pytest.fixture
def directory(tmp_path):
    return create_or_open(tmp_path / "run", short_run(), "tiny")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake(how)` puts a wandb that misbehaves into trackers; gives what it was told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(CODE)
    told = tmp_path / "told"
    told.touch()
    path = os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")])

    def use(how):
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("FAKE_WANDB", how)
        monkeypatch.setenv("FAKE_WANDB_TOLD", str(told))
        return lambda: [json.loads(line) for line in told.read_text().splitlines()]

    return use


def tracker(directory, console, mode="offline"):
    run = short_run(tracking={"wandb": mode, "project": "tiny"})
    (started,) = start_tracking(directory, run, 1, console)
    return started


def until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def end(process):
    """A tracker and what it started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


def steps_take(tracking, count) -> float:
    """Seconds of many steps; if they waited for a slow wandb, it would be 0.2 for each."""
    begun = time.monotonic()
    for step in range(count):
        tracking.step(metrics(step))
    return time.monotonic() - begun


@pytest.mark.parametrize("how", ["hangs", "slow", "late"])
def test_no_step_waits_for_wandb_and_the_end_not_for_long(directory, fake, monkeypatch, how):
    monkeypatch.setattr(tracking_pipe, "LAST_UPLOAD_S", 1.0)
    told, console = fake(how), Console()
    tracking = tracker(directory, console)
    process = tracking._pipe._process
    until(lambda: ["init", "offline"] in told())
    assert steps_take(tracking, 500) < 20
    begun = time.monotonic()
    tracking.finished({})
    assert time.monotonic() - begun < 9
    assert console.warned == [] and "in the background" in console.said[-1]
    assert process.poll() is None
    end(process)


def test_a_wandb_that_breaks_is_started_again_and_loses_no_row(directory, fake):
    told, console = fake("breaks"), Console()
    tracking = tracker(directory, console)
    for step in range(1, 7):
        tracking.step(metrics(step))
    tracking.finished({})
    rows = [values for kind, *values in told() if kind == "row"]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    numbers = [number for _, number in rows]
    assert numbers == sorted(set(numbers))
    assert told()[-1] == ["finish", 0] and ["teardown"] in told()
    assert len(console.warned) == 1 and "Connection lost" in console.warned[0]


def test_a_tracker_that_dies_is_one_warning(directory, fake):
    fake("dies")
    console = Console()
    tracking = tracker(directory, console)
    for step in range(1, 7):
        tracking.step(metrics(step))
    tracking._pipe._process.wait(20)
    tracking.step(metrics(7))
    tracking.finished({})
    assert len(console.warned) == 1 and "training goes on: its process ended" in console.warned[0]


def test_a_tracker_that_fails_at_the_end_of_a_short_run_is_one_warning(
    directory, fake, monkeypatch
):
    fake("broken")
    monkeypatch.setenv("MY_LOGIN", "planted-0123456789")
    monkeypatch.setenv("LONGSPAN_HIDDEN", "MY_LOGIN")
    console = Console()
    tracking = tracker(directory, console)
    tracking.step(metrics(1))
    tracking.finished({})
    assert len(console.warned) == 1 and "Connection refused ***" in console.warned[0]
    assert (directory.logs / "wandb.log").read_text() == "for ***\n"


def test_what_is_read_ahead_is_bounded():
    messages = tracking_process.Messages(3)
    read, write = os.pipe()
    line = json.dumps({"kind": "log", "values": {"step": 1}}) + "\n"
    with os.fdopen(read) as stream, os.fdopen(write, "w") as pipe:
        pipe.write(line * 10)
        pipe.flush()
        threading.Thread(
            target=tracking_process._read, args=(stream, messages), daemon=True
        ).start()
        until(messages.full)
        time.sleep(0.1)
        assert messages.qsize() == 3
        for _ in range(10):
            messages.get(timeout=5)


def test_what_hangs_after_the_run_is_ended_with_all_that_it_started(directory, fake, monkeypatch):
    fake("late")
    command = ("from longspan.trainer.observe import tracking_process as t; t._LAST_S = 0.5;"
               " import subprocess; subprocess.Popen(['sleep', '99']); t.main()")  # fmt: skip
    monkeypatch.setattr(tracking_pipe, "LAST_UPLOAD_S", 0.0)
    monkeypatch.setattr(tracking_pipe, "TRACKER", (tracking_pipe.TRACKER[0], "-c", command))
    tracking = tracker(directory, Console())
    process = tracking._pipe._process
    started = psutil.Process(process.pid)
    until(started.children)
    (child,) = started.children()
    tracking.finished({})
    assert process.wait(20) == 1
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_the_real_service_can_be_killed_and_stopped(directory, monkeypatch):
    monkeypatch.setattr(tracking_pipe, "LAST_UPLOAD_S", 30.0)
    console = Console()
    tracking = tracker(directory, console)
    process = tracking._pipe._process
    folders = directory.path / "wandb"
    until(lambda: (tracking.step(metrics(1)), console.said)[1], 30)

    def service():
        found = psutil.Process(process.pid).children(recursive=True)
        alive = [child for child in found if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in alive if "wandb-core" in child.name()]

    killed = service()[0]
    killed.kill()
    until(lambda: (tracking.step(metrics(2)), console.warned)[1])
    assert "started again" in console.warned[0]
    until(service)
    service()[0].suspend()
    assert steps_take(tracking, 200) < 10
    service()[0].resume()
    tracking.step(metrics(3))
    tracking.finished({})
    assert len(console.warned) == 1
    logs = sorted(folders.glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and len({log.name for log in logs}) == 1
    assert inspected(logs[1])["history"][-1]["item"]["step"] == 3


class Server(BaseHTTPRequestHandler):
    """Answers as W&B does to a key."""

    code, viewer = 200, None

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"data": {"viewer": type(self).viewer}}).encode()
        self.send_response(type(self).code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """`server(code, viewer)` sets the answer of the server that wandb is told of."""
    listening = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def answer(code, viewer):
        Server.code, Server.viewer = code, viewer
        return url

    yield answer
    listening.shutdown()
    listening.server_close()


@pytest.mark.parametrize(
    ("code", "viewer", "answer"),
    [(200, {"id": "x"}, "accepted"), (200, None, "rejected"), (401, None, "rejected"),
     (403, None, "rejected"), (500, None, "unknown")],
)  # fmt: skip
def test_the_server_says_whether_it_takes_the_key(server, code, viewer, answer):
    assert wandb_account.probe(server(code, viewer)) == answer


def test_a_server_that_is_not_there_is_unreachable(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_account.probe("http://127.0.0.1:9") == "unreachable"
    monkeypatch.delenv("WANDB_API_KEY")
    assert wandb_account.probe("http://127.0.0.1:9") == "unknown"


def test_a_key_that_is_rejected_is_an_error_before_training(server, fake):
    fake("")
    server(401, None)
    with pytest.raises(RunError, match="rejects the key that the environment variable WANDB") as e:
        wandb_account.check_tracking(TrackingSettings(wandb="online"))
    assert "wandb login --relogin" in e.value.fix and KEY not in str(e.value)
    server(200, {"id": "x"})
    wandb_account.check_tracking(TrackingSettings(wandb="online"))
    wandb_account.check_tracking(TrackingSettings())


@pytest.mark.parametrize("how", ["rejected", "on a cluster", "unreachable", "refuses"])
def test_a_run_that_cannot_be_online_is_offline_and_says_why(
    directory, fake, server, monkeypatch, how
):
    told, console = fake(how), Console()
    server(401 if how in ("rejected", "on a cluster") else 200, {"id": "x"})
    if how == "on a cluster":
        monkeypatch.setenv("LONGSPAN_HIDDEN", "WANDB_API_KEY")
    if how == "unreachable":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracking = tracker(directory, console, "online")
    tracking.step(metrics(1))
    tracking.finished({})
    modes = [mode for kind, *rest in told() if kind == "init" for mode in rest]
    assert modes == (["online", "offline"] if how == "refuses" else ["offline"])
    why = {"rejected": "wandb login --relogin", "on a cluster": "in `secrets` of the cluster in",
           "unreachable": "http://127.0.0.1:9 cannot be",
           "refuses": "offline"}[how]  # fmt: skip
    assert why in console.said[0] and "to upload: wandb sync" in console.said[-1]
    assert [row for row in told() if row[0] == "row"] and console.warned == []


def test_an_online_run_is_marked_when_all_of_it_is_uploaded(directory, fake, server):
    fake("")
    server(200, {"id": "x"})
    folder = directory.path / "wandb" / "run-1-x"
    folder.mkdir(parents=True)
    (folder / "run-x.wandb").touch()
    (directory.path / "run-1-x").mkdir()
    assert "--include-online" in (sync_command(directory.path) or "")
    console = Console()
    tracking = tracker(directory, console, "online")
    tracking.finished({})
    first, last = console.said
    assert first.startswith("Weights & Biases: http://run; earlier attempts are not there yet")
    assert last.startswith("Weights & Biases: to upload: wandb sync --include-online ")
    assert (directory.path / "run-1-x" / "uploaded").exists()
    (folder / "uploaded").touch()
    assert sync_command(directory.path) is None


def test_an_export_is_told_to_the_run_that_it_is_of(directory, fake, monkeypatch, tmp_path):
    told = fake("")
    assert track_export(directory, tmp_path / "out", "step-8") == [] and told() == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id(directory, short_run())
    assert track_export(directory, tmp_path / "out", "step-8") == []  # its recipe says off
    other = create_or_open(tmp_path / "other", short_run(tracking={"wandb": "offline"}), "tiny")
    run_id(other, short_run())
    (said,) = track_export(other, tmp_path / "out", "step-8")
    assert "wandb sync" in said or "off" in said
    assert ["init", "offline"] in told()
