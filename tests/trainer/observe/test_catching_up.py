"""Attempts that were offline are uploaded before one that is online begins, and only then."""

import fcntl
import gc
import json
import os
import time
from pathlib import Path

import pytest
from longspan.trainer.observe import tracking_pipe, wandb_back, wandb_folders
from longspan.trainer.observe.tracking import start_tracking
from longspan.trainer.observe.wandb_folders import catch_up, claim, not_uploaded, sync_command
from longspan.trainer.run_directory import create_or_open
from support.short_run import short_run
from support.tracked import Console, metrics, without_set_up
from support.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    without_set_up(tmp_path, monkeypatch)
    monkeypatch.setattr(tracking_pipe, "LAST_UPLOAD_S", 120.0)


@pytest.fixture
def server(monkeypatch):
    """W&B on loopback, with a key for it."""
    served = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", served.url)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    yield served
    served.close()


def attempt(directory, mode, number):
    """Three steps; what was said."""
    console = Console()
    run = short_run(tracking={"wandb": mode, "project": "tiny"})
    (tracking,) = start_tracking(directory, run, number, console)
    for step in range(3 * number - 2, 3 * number + 1):
        tracking.step(metrics(step))
        with directory.events.open("a") as events:
            events.write("{}\n")
    tracking.finished({})
    assert console.warned == []
    return console.said


def test_all_attempts_are_one_history_in_order_on_the_server(tmp_path, server):
    """By the real wandb."""
    directory = create_or_open(tmp_path / "run", short_run(), "tiny")
    for number in (1, 2):
        assert "to upload: wandb sync" in attempt(directory, "offline", number)[-1]
    assert len(not_uploaded(directory.path)) == 2 and not server.histories
    said, *more = attempt(directory, "online", 3)
    assert more == []
    assert said.startswith(f"Weights & Biases: {server.url}/me/tiny/runs/") and "sync" not in said
    assert sync_command(directory.path) is None
    (history,) = server.histories.values()
    rows = [history[place] for place in sorted(history)]
    assert list(history) == list(range(len(rows)))
    steps = [(row["attempt"], row["step"]) for row in rows if "train/loss" in row]
    assert steps == [(1 + (step - 1) // 3, step) for step in range(1, 10)]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})


@pytest.fixture
def synced(tmp_path, monkeypatch):
    """`synced(*folders)`: what a catching up gives to wandb, and what was not sent."""
    (tmp_path / "wandb.py").write_text(
        "import json, sys, time\n"
        "json.dump(sys.argv[1:], open('told', 'w'))\n"
        "how = open('how').read()\n"
        "for folder in sys.argv[2:]:\n"
        "    time.sleep(99 * (how == f'hang at {folder[-3:]}'))\n"
        "    how.startswith('fail') and sys.exit(int(how[-1]))\n"
        "    open(f'{folder}/run-x.wandb.synced', 'w')\n"
    )
    (tmp_path / "how").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def call(*folders) -> tuple[list[str], str]:
        for name in folders:
            folder = tmp_path / "run" / "wandb" / name.removesuffix("+")
            folder.mkdir(parents=True)
            (folder / "run-x.wandb").touch()
            if name.endswith("+"):
                (folder / "uploaded").touch()
        why = catch_up(tmp_path / "run")
        told = tmp_path / "told"
        words = json.loads(told.read_text()) if told.exists() else []
        return [Path(word).name for word in words], why

    return call


def test_what_would_come_too_late_is_left_to_the_user(synced, tmp_path):
    """Rows of an attempt before one that was online would go back."""
    assert synced("offline-run-1-x", "run-2-x+") == ([], "")
    sent = ["sync", "offline-run-3-x", "offline-run-4-x"]
    assert synced("offline-run-3-x", "offline-run-4-x") == (sent, "")
    assert "offline-run-1-x" in str(not_uploaded(tmp_path / "run")[0])


def test_what_was_cut_off_is_not_sent_twice(synced, tmp_path, monkeypatch):
    """The rest has its place still, and comes before the next attempt that is online."""
    monkeypatch.setattr(wandb_folders, "_CATCH_UP_S", 2.0)
    (tmp_path / "how").write_text("hang at 2-x")
    begun, run = time.monotonic(), tmp_path / "run"
    _, why = synced("offline-run-1-x", "offline-run-2-x", "offline-run-3-x")
    assert why == (
        "the upload of earlier attempts took more than 2 s (offline-run-2-x is there in part)"
    )
    assert time.monotonic() - begun < 60
    command, _, note = str(sync_command(run)).partition("  # ")
    assert command.split()[:3] == ["wandb", "sync", "--include-online"]
    assert [Path(word).name for word in command.split()[3:]] == ["offline-run-3-x"]
    assert note == "offline-run-2-x: there in part, twice if sent again"
    (tmp_path / "how").write_text("")
    assert synced("offline-run-4-x") == (["sync", "offline-run-3-x", "offline-run-4-x"], "")
    assert sync_command(run) is None


@pytest.mark.parametrize("code", [0, 3])
def test_an_upload_that_fails_is_told(synced, tmp_path, code):
    """Also where wandb does not say so."""
    (tmp_path / "how").write_text(f"fail {code}")
    _, why = synced("offline-run-1-x")
    assert why.endswith(f"failed (wandb sync ended with exit code {code})")
    assert "offline-run-*" in str(sync_command(tmp_path / "run"))


def test_an_attempt_is_offline_where_earlier_ones_could_not_be_sent(tmp_path, server, monkeypatch):
    """Online it would take their place in the history."""
    directory = create_or_open(tmp_path / "run", short_run(), "tiny")
    attempt(directory, "offline", 1)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "'sync' in sys.orig_argv and os._exit(7)\n"
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}/bin:{os.environ['PYTHONPATH']}")
        said = attempt(directory, "online", 2)
    assert said[0] == (
        "Weights & Biases: offline, as the upload of earlier attempts failed (wandb sync ended "
        "with exit code 7)"
    )
    assert len(not_uploaded(directory.path)) == 2 and not server.histories
    attempt(directory, "online", 3)
    assert sync_command(directory.path) is None
    (history,) = server.histories.values()
    steps = [row["step"] for row in history.values() if "train/loss" in row]
    assert steps == list(range(1, 10))


def test_a_further_start_keeps_the_lock_and_stays_offline(tmp_path, monkeypatch):
    """Another process must not track the run beside it, nor later rows come before earlier ones."""
    directory = create_or_open(tmp_path / "run", short_run(), "tiny")
    begin = {"dir": str(directory.path), "events": str(directory.events), "events_size": 0,
             "mode": "online", "config": None, "attempt": 1}  # fmt: skip
    modes = []

    class Run:
        url = ""
        define_metric = staticmethod(lambda *_: None)

    def start(self, mode):
        modes.append(mode)
        self._begin["started"] = True
        return Run()

    answers = ["it is down", ""]
    monkeypatch.setattr(wandb_back.WandbBack, "_start", start)
    monkeypatch.setattr(wandb_back.WandbBack, "_why_not", lambda self: answers.pop(0))
    first = wandb_back.WandbBack(begin)
    second = wandb_back.WandbBack(begin)
    del first
    gc.collect()
    assert claim(directory.path) is None and modes == ["offline", "offline"]
    assert second.about == "offline, as it is down"


def test_only_one_tracks_a_run(tmp_path):
    (tmp_path / "wandb").mkdir()
    lock = claim(tmp_path)
    assert lock is not None and claim(tmp_path) is None
    lock.close()
    again = claim(tmp_path)
    assert again is not None
    fcntl.flock(again, fcntl.LOCK_UN)
    assert claim(tmp_path) is not None
