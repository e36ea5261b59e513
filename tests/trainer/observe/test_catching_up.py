"""Attempts that were offline are uploaded before one that is online begins, and only then."""

import fcntl
import json
import time
from pathlib import Path

import pytest
from longspan.trainer.observe import tracking_pipe, wandb_folders
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
    """`synced(*folders)`: which of a run's folders a catching up gives to wandb."""
    (tmp_path / "wandb.py").write_text(
        "import json, sys, time\n"
        "json.dump(sys.argv[1:], open('told', 'w'))\n"
        "time.sleep(99 * ('hang' in open('how').read()))\n"
    )
    (tmp_path / "how").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def call(*folders) -> list[str]:
        for name in folders:
            folder = tmp_path / "run" / "wandb" / name.removesuffix("+")
            folder.mkdir(parents=True)
            (folder / "run-x.wandb").touch()
            if name.endswith("+"):
                (folder / "uploaded").touch()
        catch_up(tmp_path / "run")
        told = tmp_path / "told"
        return [Path(word).name for word in json.loads(told.read_text())] if told.exists() else []

    return call


def test_what_would_come_too_late_is_left_to_the_user(synced, tmp_path):
    """Rows of an attempt before one that was online would go back."""
    assert synced("offline-run-1-x", "run-2-x+") == []
    assert synced("offline-run-3-x", "offline-run-4-x") == [
        "sync", "offline-run-3-x", "offline-run-4-x"
    ]  # fmt: skip
    assert "offline-run-1-x" in str(not_uploaded(tmp_path / "run")[0])


def test_an_upload_that_hangs_is_ended(synced, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_folders, "_CATCH_UP_S", 2.0)
    (tmp_path / "how").write_text("hang")
    begun = time.monotonic()
    assert synced("offline-run-1-x")[0] == "sync"
    assert time.monotonic() - begun < 60 and sync_command(tmp_path / "run") is not None


def test_only_one_tracks_a_run(tmp_path):
    (tmp_path / "wandb").mkdir()
    lock = claim(tmp_path)
    assert lock is not None and claim(tmp_path) is None
    lock.close()
    again = claim(tmp_path)
    assert again is not None
    fcntl.flock(again, fcntl.LOCK_UN)
    assert claim(tmp_path) is not None
