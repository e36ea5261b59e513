"""Attempts of one run, stopped, killed, failed and completed: one history, and no credential.

Real launchers and ranks print keys in every step; W&B's own reader reads what is left.
"""

import json
import os
import time
from collections import defaultdict

import psutil
import pytest
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.manifest import read_manifest
from longspan.trainer.observe.events import read_events
from longspan.trainer.observe.tracking import run_id
from longspan.trainer.run_directory import RunDirectory
from longspan.trainer.status import read_status, render_status
from support import interrupted
from support.forks import Forks, Launch
from support.kills import environment, tiny_settings
from support.tracked import inspected, tensorboard_points
from support.unkilled import committed

STEPS = 8
PATCHES = ("is_stopped", "is_killed", "fails", "completes")
CODES = (75, -9, 1, 0)


class Tracked:
    """The run of all tests here, its attempts over."""

    def __init__(self, folder):
        self.home = home = folder / "home"
        home.mkdir()
        planted, self.keys = interrupted.plant(home)
        settings = tiny_settings(folder / "texts", STEPS, 2)
        settings["stages"][0]["name"] = "first"
        settings |= {"tracking": {"wandb": "offline", "tensorboard": True},
                     "telemetry": {"every": 2, "rows": 4}}  # fmt: skip
        sampling = {"WANDB_X_STATS_SAMPLING_INTERVAL": "0.2"}
        forks = Forks(environment(folder / "cache") | planted | sampling)
        self.run_dir, self.control = folder / "run", folder / "control"
        self.codes = []
        try:
            holding = settings | {"tracking": {"wandb": "offline", "project": self.keys[0]}}
            refused = Launch(folder / "refused", holding, self.control)
            self.refused = forks.run(refused, 120), refused.run_dir.exists()
            for patch in PATCHES:
                launch = Launch(self.run_dir, settings, self.control,
                                patch=f"support.interrupted:{patch}")  # fmt: skip
                self.codes.append(forks.run(launch, 120))
                wait_for_trackers(folder)
        finally:
            forks.close()
        self.output = (self.control / "output.log").read_text()

    def events(self, name):
        return [e for e in read_events(self.run_dir / "events.jsonl") if e["event"] == name]

    def records(self):
        """What wandb's reader finds, by attempt in the order of uploads."""
        folders = sorted((self.run_dir / "wandb").glob("offline-run-*"))
        return [inspected(next(folder.glob("*.wandb"))) for folder in folders]


def wait_for_trackers(folder, seconds=60):
    """Until nothing works in a folder: trackers outlive a killed run for a moment."""
    deadline = time.monotonic() + seconds
    while any(works_in(process, str(folder)) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "a tracker does not end"
        time.sleep(0.2)


def works_in(process, folder) -> bool:
    try:
        return process.cwd() == folder and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    return Tracked(tmp_path_factory.mktemp("tracked"))


@pytest.fixture(scope="module")
def records(tracked):
    return tracked.records()


def rows_with(records, key):
    return [row["item"] for found in records for row in found["history"] if key in row["item"]]


def test_the_attempts_end_as_they_should(tracked):
    assert tuple(tracked.codes) == CODES, tracked.output[-3000:]
    steps = [(event["attempt"], event["step"]) for event in tracked.events("step")]
    assert len(steps) > STEPS and {step for _, step in steps} == set(range(1, STEPS + 1))


def test_all_attempts_are_one_history_under_one_id(tracked, records):
    assert len(records) == len(PATCHES)
    runs = [run for found in records for run in found["run"]]
    identity = json.loads((tracked.run_dir / "wandb.json").read_text())["id"]
    assert {run["run_id"] for run in runs} == {identity}
    assert [run["resume"] for run in runs] == [True] * len(runs)
    numbers = [row["item"]["_step"] for found in records for row in found["history"]]
    assert numbers == sorted(set(numbers)), "an upload would drop or renumber rows"
    told = [
        (event["attempt"], event["step"], event["tokens"], event["loss"], event["stage"])
        for event in tracked.events("step")
    ]
    tracked_rows = [
        (row["attempt"], row["step"], row["tokens"], row["train/loss"], row["stage"])
        for row in rows_with(records, "train/loss")
    ]
    assert tracked_rows == told


def test_recomputed_steps_carry_the_number_of_their_attempt(records):
    by_step = defaultdict(list)
    for number, found in enumerate(records, 1):
        for row in found["history"]:
            assert row["item"]["attempt"] == number
        for row in rows_with([found], "train/loss"):
            by_step[row["step"]].append((number, row["train/loss"]))
    again = {step: rows for step, rows in by_step.items() if len(rows) > 1}
    assert interrupted.KILLED_AT in again
    for rows in again.values():
        assert len({number for number, _ in rows}) == len(rows)
        assert len({loss for _, loss in rows}) == 1


def test_metrics_have_their_axes_and_the_machine_is_measured(records):
    for found in records:
        axes = {m["glob_name"]: m["step_metric"] for m in found["metric"] if "glob_name" in m}
        assert axes["train/*"] == "step" and axes["by_tokens/*"] == "tokens"
        assert {"step", "tokens", "attempt"} <= {m.get("name") for m in found["metric"]}
    assert any("proc.memory.rssMB" in stats["item"] for stats in records[-1]["stats"])
    layers = rows_with(records, "attention/layer_1/entropy")
    assert layers and all(row["step"] % 2 == 0 for row in layers)
    configs = [update for found in records for c in found["config"] for update in [c["update"]]]
    assert any(config.get("stages") for config in configs)


def test_checkpoints_and_tables_are_kept_offline(tracked, records):
    artifacts = [artifact for found in records for artifact in found["artifact"]]
    of = [json.loads(a["metadata"]) for a in artifacts if a["type"] == "checkpoint"]
    saved = [(e["attempt"], e["step"], e["path"]) for e in tracked.events("saved")]
    assert [(about["attempt"], about["step"], about["path"]) for about in of] == saved
    # Those that retention had removed before wandb had started are known by their path alone.
    last = [a for a in artifacts if a["type"] == "checkpoint"][-1]
    refs = [entry["ref"] for entry in last["manifest"]["contents"]]
    assert f"file://{saved[-1][2]}/manifest.json" in refs and "latest" in last["aliases"]
    (last,) = [row for row in rows_with(records, "step") if "evaluation/stages._type" in row]
    table = next(
        (tracked.run_dir / "wandb").glob("offline-run-*/files/" + last["evaluation/stages.path"])
    )
    stages = json.loads(table.read_text())
    names = [row[stages["columns"].index("name")] for row in stages["data"]]
    assert names == ["first", "long"]


def test_checkpoints_know_the_run_on_weights_and_biases(tracked):
    identity = json.loads((tracked.run_dir / "wandb.json").read_text())["id"]
    for checkpoint in committed(tracked.run_dir):
        info = read_manifest(CheckpointFiles.of(checkpoint)).info
        assert info["tracking"] == {"wandb": identity}
    (tracked.run_dir / "wandb.json").unlink()
    directory = RunDirectory(tracked.run_dir)
    assert run_id(directory, directory.load_settings()) == identity


def test_what_uploads_the_metrics_is_said_at_the_end_and_in_status(tracked, monkeypatch):
    monkeypatch.chdir(tracked.run_dir.parent)
    command = "wandb sync run/wandb/offline-run-*"
    status = read_status(RunDirectory(tracked.run_dir))
    assert command in render_status(status) and status.as_dict()["sync"] == command
    last = tracked.output.rpartition("evaluated")[2]
    assert f"to upload: {command}" in last
    for folder in (tracked.run_dir / "wandb").glob("offline-run-*"):
        (folder / f"{next(folder.glob('*.wandb')).name}.synced").touch()
    assert "wandb sync" not in render_status(read_status(RunDirectory(tracked.run_dir)))


def test_a_recipe_that_holds_a_key_is_refused_and_leaves_nothing(tracked):
    assert tracked.refused == (2, False)
    where = "tracking.project holds a credential, that of the environment variable WANDB_API_KEY"
    assert where in tracked.output


def test_no_key_is_in_any_file_or_line(tracked):
    assert set(tracked.keys) > {"1" + "0123456789abcdef0123456789abcdef01234567"[1:]}
    looked_at = [tracked.control / "output.log"]
    looked_at += [path for path in tracked.run_dir.rglob("*") if path.is_file()]
    looked_at += list(tracked.home.rglob("*.log"))
    for path in looked_at:
        content = path.read_bytes()
        name = path.relative_to(tracked.home.parent)
        found = [key for key in tracked.keys if key.encode() in content]
        assert not found, f"{name} holds {found}"
    # They were printed: the lines are there, and the failure with its traceback.
    names = {path.name for path in looked_at}
    assert {"rank-1.log", "wandb.log", "events.jsonl", "debug.log"} <= names
    for text in (tracked.output, (tracked.run_dir / "logs" / "rank-1.log").read_text()):
        assert "step 1: *** ***" in text and "past Python: *** ***" in text
        assert "no end of line: *** ***" in text
    assert "ConnectionError: refused: *** ***" in tracked.output
    (failed,) = [event for event in tracked.events("ended") if event["code"] == 1]
    assert "refused: ***" in failed["reason"]


def test_tensorboard_shows_each_step_once(tracked):
    points = tensorboard_points(tracked.run_dir / "tensorboard")
    shown = {step: values for (tag, step), values in points.items() if tag == "train/loss"}
    newest = {event["step"]: event["loss"] for event in tracked.events("step")}
    assert shown == {step: [pytest.approx(loss)] for step, loss in newest.items()}


def test_the_run_leaves_no_process(tracked):
    assert not [p for p in psutil.process_iter() if works_in(p, str(tracked.run_dir.parent))]
    assert os.path.exists(tracked.run_dir / "complete.json")  # noqa: PTH110
