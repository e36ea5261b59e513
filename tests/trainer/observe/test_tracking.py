"""Weights & Biases is found as wandb finds it, continues a run, and can fail without harm."""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from longspan.errors import RunError
from longspan.trainer.observe import tracking, tracking_pipe, wandb_account
from longspan.trainer.observe.observer import open_observer
from longspan.trainer.run_directory import create_or_open
from longspan.trainer.settings import RunSettings, TrackingSettings
from support.short_run import short_run
from support.tracked import Console, metrics, without_set_up

AUTO = TrackingSettings()
KEY = "0123456789abcdef0123456789abcdef01234567"


def settings(mode="offline") -> RunSettings:
    return short_run(tracking={"wandb": mode, "project": "tiny"})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home and a folder without any wandb set-up, whatever this machine has."""
    without_set_up(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def directory(tmp_path):
    return create_or_open(tmp_path / "runs" / "tiny", settings(), "tiny")


def test_auto_is_off_without_any_set_up(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert wandb_account.resolve_mode(AUTO) == "off"
    assert "wandb" not in sys.modules


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "online"}, "off"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "off"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, "off"),
    ],
)
def test_auto_follows_the_environment(monkeypatch, variables, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_account.resolve_mode(AUTO) == mode


def test_auto_finds_a_login_in_netrc_for_the_right_host(home, monkeypatch):
    (home / ".netrc").write_text(f"machine example.org login user password {KEY}\n")
    assert wandb_account.resolve_mode(AUTO) == "off"
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_account.resolve_mode(AUTO) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_account.resolve_mode(AUTO) == "off"


def test_auto_reads_the_settings_files_of_wandb(home):
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text(f"[default]\napi_key = {KEY}\n")
    assert wandb_account.resolve_mode(AUTO) == "online"
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_account.resolve_mode(AUTO) == "offline"


def test_online_without_a_key_is_an_error_before_training(monkeypatch):
    with pytest.raises(RunError, match="no Weights & Biases key") as caught:
        wandb_account.check_tracking(TrackingSettings(wandb="online"))
    assert "wandb login" in caught.value.fix
    wandb_account.check_tracking(TrackingSettings(wandb="offline"))
    wandb_account.check_tracking(AUTO)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb_account.check_tracking(TrackingSettings(wandb="online"))


def test_the_process_that_trains_does_not_import_wandb(directory, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    observer = open_observer(directory, settings("auto"), rank=0)
    for step in range(1, 4):
        observer.step(metrics(step))
    observer.stopped(3, "asked")
    observer.close()
    identity = json.loads((directory.path / "wandb.json").read_text())["id"]
    (log,) = (directory.path / "wandb").glob(f"offline-run-*-{identity}/*.wandb")
    assert b"train/loss" in log.read_bytes() and "wandb" not in sys.modules


class Sent:
    """In place of a pipe: keeps the messages."""

    def __init__(self):
        self.messages = []

    def send(self, kind, values):
        self.messages.append((kind, dict(values)))

    def finish(self, code):
        self.messages.append(("finish", code))


def test_all_news_are_rows_with_step_tokens_stage_and_attempt():
    sent = Sent()
    tracker = tracking.Tracking(sent, attempt=3, run_id="abc")
    tracker.compared(0, {"loss": 4.0, "words": "no number"})
    tracker.stage_started("short", 0, {})
    tracker.restored(1, Path("step-1"), 0.5)
    tracker.step(metrics(2))
    tracker.observed(2, [{"entropy": 1.0}, {"entropy": 2.0}])
    tracker.skipped(3, 9.0, 8.0, "spike")
    tracker.rewound(4, 2, 8, "spike")
    tracker.saving(4, 0.25)
    tracker.close()
    rows = [values for kind, values in sent.messages if kind == "log"]
    assert all(row["attempt"] == 3 for row in rows)
    assert rows[0] == {"step": 0, "attempt": 3, "canary/loss": 4.0}
    where = {"attempt": 3, "tokens": 2048, "stage": "short"}
    assert rows[2]["train/loss"] == rows[2]["by_tokens/loss"] == 4.5
    assert rows[3:] == [
        {"step": 2, **where, "attention/layer_0/entropy": 1.0, "attention/layer_1/entropy": 2.0},
        {"step": 3, **where, "skipped/loss": 9.0, "skipped/grad_norm": 8.0},
        {"step": 4, **where, "rewound/to": 2, "rewound/sequences": 8},
        {"step": 4, **where, "checkpoint/stall_s": 0.25},
    ]
    back = [values for kind, values in sent.messages if kind == "back_to"]
    assert back == [{"step": 1}, {"step": 2}] and sent.messages[-1] == ("finish", 1)


def test_an_evaluation_is_a_row_and_its_lists_are_tables():
    sent = Sent()
    tracker = tracking.Tracking(sent, attempt=1)
    buckets = [{"first": 0, "last": 8, "loss": 4.0}, {"first": 8, "last": 16, "loss": 3.5}]
    tracker.evaluated("context", 5, {"gain": 0.5, "buckets": buckets}, 2.0)
    tracker.evaluated("held_out", 5, {"loss": 4.0}, 1.0)
    tracker.finished({"steps": 5, "stages": [{"name": "a", "loss": 4.0, "context": {}}]})
    at = {"step": 5, "attempt": 1}
    assert sent.messages[:3] == [
        ("log", {**at, "context/gain": 0.5, "context/seconds": 2.0}),
        ("table", {"name": "context/buckets", "columns": ["first", "last", "loss"],
                   "rows": [[0, 8, 4.0], [8, 16, 3.5]], "at": at}),
        ("log", {**at, "held_out/loss": 4.0, "held_out/seconds": 1.0,
                 "by_tokens/held_out_loss": 4.0}),
    ]  # fmt: skip
    (table,) = [values for kind, values in sent.messages[3:] if kind == "table"]
    assert table["columns"] == ["name", "loss"] and table["rows"] == [["a", 4.0]]


def test_context_ranks_and_alarms_are_tracked(directory, monkeypatch, tmp_path):
    script = "import sys; open('sent', 'wb').write(sys.stdin.buffer.read())"
    monkeypatch.setattr(tracking_pipe, "TRACKER", (sys.executable, "-c", script))
    (tracker,) = tracking.start_tracking(directory, settings(), 1, Console())
    tracker.step(metrics(1))
    of_context = {"context_bytes": 7, "context_wait_s": 0.0, "imbalance": 1.25}
    tracker.step(replace(metrics(2), **of_context))
    tracker.alarm("mfu", 2, "too fast")
    tracker.close()
    sent = [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()]
    logs = [message["values"] for message in sent if message["kind"] == "log"]
    assert not any("context" in key or "imbalance" in key for key in logs[0])
    assert {key: logs[1][f"train/{key}"] for key in of_context} == of_context
    summary = {"kind": "summary", "values": {"alarm/mfu": "step 2: too fast"}}
    assert [message for message in sent if message["kind"] == "summary"] == [summary]


def test_no_credential_is_tracked_and_the_goodput_is(directory, monkeypatch, tmp_path):
    script = "import sys; open('sent', 'wb').write(sys.stdin.buffer.read())"
    monkeypatch.setattr(tracking_pipe, "TRACKER", (sys.executable, "-c", script))
    run = settings()
    project = TrackingSettings(wandb="offline", project="https://me:password-of-mine@host")
    run = run.model_copy(update={"tracking": project})
    (tracker,) = tracking.start_tracking(directory, run, 1, Console())
    tracker.alarm("save", 2, "refused: api_key='password-of-mine'")
    tracker.finished({"goodput": {"share": 0.5, "seconds": {"productive": 2.0}}})
    sent = (tmp_path / "sent").read_text()
    assert "password-of-mine" not in sent and "https://***@host" in sent
    messages = [json.loads(line) for line in sent.splitlines()]
    summaries = [message["values"] for message in messages if message["kind"] == "summary"]
    assert summaries[-1]["goodput"] == {"share": 0.5, "seconds": {"productive": 2.0}}
    assert messages[0]["values"]["config"]["stages"][0]["batch_tokens"] == 1024


def test_a_path_with_an_ordinary_word_that_is_hidden_still_leads_there(monkeypatch, tmp_path):
    script = "import sys; open('sent', 'wb').write(sys.stdin.buffer.read())"
    monkeypatch.setattr(tracking_pipe, "TRACKER", (sys.executable, "-c", script))
    monkeypatch.setenv("MY_LOGIN", "somebody-1")
    monkeypatch.setenv("LONGSPAN_HIDDEN", "MY_LOGIN")
    run = settings()
    directory = create_or_open(tmp_path / "somebody-1" / "mine", run, "tiny")
    project = TrackingSettings(wandb="offline", project="of somebody-1")
    config = run.model_copy(update={"tracking": project})
    (tracker,) = tracking.start_tracking(directory, config, 1, Console())
    tracker.close()
    begin = json.loads((tmp_path / "sent").read_text().splitlines()[0])["values"]
    assert begin["dir"] == str(directory.path) and begin["events"] == str(directory.events)
    assert begin["project"] == begin["config"]["tracking"]["project"] == "of ***"


def test_a_tracker_that_fails_turns_tracking_off_with_one_warning(directory, monkeypatch):
    script = "print('failed no route to host', flush=True)"
    monkeypatch.setattr(tracking_pipe, "TRACKER", (sys.executable, "-c", script))
    console = Console()
    (tracker,) = tracking.start_tracking(directory, settings(), 1, console)
    deadline = time.monotonic() + 20
    while not console.warned and time.monotonic() < deadline:
        tracker.step(metrics(1))
    tracker.step(metrics(2))
    tracker.finished({})
    tracker.close()
    text = "Weights & Biases is off, training goes on: no route to host"
    assert console.warned == [text]


def test_a_tracker_that_is_killed_does_no_harm(directory, monkeypatch):
    script = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(tracking_pipe, "TRACKER", (sys.executable, "-c", script))
    console = Console()
    (tracker,) = tracking.start_tracking(directory, settings(), 1, console)
    tracker._pipe._process.wait()
    tracker.step(metrics(1))
    tracker.finished({})
    assert len(console.warned) == 1 and "wandb.log" in console.warned[0]


def test_a_tracker_that_hangs_never_blocks_a_step(directory, monkeypatch):
    monkeypatch.setattr(
        tracking_pipe, "TRACKER", (sys.executable, "-c", "import time; time.sleep(99)")
    )
    monkeypatch.setattr(tracking_pipe, "MOST_PENDING_BYTES", 10_000)
    monkeypatch.setattr(tracking_pipe, "LAST_UPLOAD_S", 0.1)
    console = Console()
    (tracker,) = tracking.start_tracking(directory, settings(), 1, console)
    process = tracker._pipe._process
    for step in range(2000):
        tracker.step(metrics(step))
    tracker.close()
    process.send_signal(signal.SIGKILL)
    assert len(console.warned) == 1 and "does not keep up" in console.warned[0]


def test_an_upload_that_takes_long_does_not_hold_the_run_back(directory, monkeypatch):
    script = "import sys, time; sys.stdin.read(); time.sleep(99)"
    monkeypatch.setattr(tracking_pipe, "TRACKER", (sys.executable, "-c", script))
    monkeypatch.setattr(tracking_pipe, "LAST_UPLOAD_S", 0.1)
    console = Console()
    (tracker,) = tracking.start_tracking(directory, settings(), 1, console)
    process = tracker._pipe._process
    tracker.finished({})
    process.kill()
    assert console.warned == [] and "in the background" in console.said[-1]


def test_a_tracker_that_cannot_start_is_a_warning(directory, monkeypatch):
    monkeypatch.setattr(tracking_pipe, "TRACKER", ("/nowhere/python",))
    console = Console()
    assert tracking.start_tracking(directory, settings(), 1, console) == []
    assert len(console.warned) == 1
