"""`status`, `logs`, `stop`, `resume` and `runs` for runs on a cluster."""

import json
import shlex
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from longspan.cluster import listing, standing, stop
from longspan.cluster.jobs import Job, Jobs
from longspan.cluster.registry import Record, Registry
from longspan.cluster.standing import merged
from longspan.trainer.observe.events import EventLog
from support.recorded import leave_run, step_event


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stop, "_POLL_S", 0.02)


def later(seconds: float, do) -> None:
    threading.Timer(seconds, do).start()


def test_a_run_from_queue_to_end(longspan, dashboard, lab, folder):
    job = dashboard.jobs["mine-1"]
    job["status"] = "PENDING"
    code, out, _ = longspan("status", "mi")
    assert code == 0 and out.startswith("mine: queued: the cluster is about to start it\n")
    assert "cluster lab, job mine-1 pending since " in out and "resume" not in out
    job["status"] = "RUNNING"
    directory = folder(3, None)
    _, out, _ = longspan("status", "mine")
    assert out.startswith("mine: running\n") and "step 3 of 8" in out and "resume" not in out
    EventLog(directory.events, 1).write("ended", code=75, how="stopped")
    dashboard.end(job, "FAILED", 75)
    _, out, _ = longspan("status", "mine")
    assert out.startswith("mine: stopped, and saved\n") and "  longspan resume mine" in out
    directory.mark_complete({})
    dashboard.end(job, "SUCCEEDED", 0)
    _, out, _ = longspan("status", "mine")
    assert out.startswith("mine: complete\n") and "longspan resume" not in out


@pytest.mark.parametrize(
    ("folder", "status", "code", "state"),
    [
        (None, "PENDING", None, "queued"), ("stopped", "PENDING", None, "queued"),
        ("new", "RUNNING", None, "running"), ("complete", "RUNNING", None, "complete"),
        (None, "SUCCEEDED", 0, "complete"), (None, "STOPPED", None, "stopped"),
        (None, "FAILED", 75, "stopped"), (None, "FAILED", 130, "interrupted"),
        (None, "FAILED", 2, "failed"), (None, "FAILED", None, "failed"),
        ("stopped", "STOPPED", None, "stopped"), ("failed", "FAILED", 75, "failed"),
        ("lost", "STOPPED", None, "interrupted"), ("running", "STOPPED", None, "interrupted"),
        ("running", "FAILED", 1, "failed"), ("lost", "FAILED", None, "failed"),
        ("complete", "FAILED", 1, "complete"), ("complete", "FAILED", 2, "complete"),
        # The end of an older job: this one has left nothing in the folder.
        ("stopped", "FAILED", 2, "failed"), ("stopped", "FAILED", 1, "failed"),
        ("interrupted", "FAILED", 2, "failed"), ("failed", "FAILED", 2, "failed"),
        ("stopped", "FAILED", 75, "stopped"), ("interrupted", "FAILED", 130, "interrupted"),
        ("stopped", None, None, "stopped"), (None, None, None, "unknown"),
    ],
)  # fmt: skip
def test_what_folder_and_job_say_together(folder, status, code, state):
    job = None if status is None else Job("a-1", status, exit_code=code)
    assert merged(folder, job) == state


def test_a_folder_that_is_not_visible_is_made_up_for_by_the_output(longspan, dashboard, mine):
    dashboard.output["mine-1"] += "".join(f"step={n}\n" for n in range(9))
    _, out, _ = longspan("status", "mine")
    assert "/runs/mine (not there yet)\n" in out and out.endswith("    step=7\n    step=8\n")
    assert "step=3" not in out
    values = json.loads(longspan("status", "mine", "--json")[1])
    assert (values["id"], values["state"], values["job"]) == ("mine", "running", "mine-1")


def test_a_cluster_that_is_down_is_a_note(longspan, dashboard, folder):
    folder(3)
    dashboard.stop()
    code, out, _ = longspan("status", "mine")
    assert code == 0 and out.startswith("mine: stopped, and saved\n") and "step 3 of 8" in out
    assert "note: cluster lab" in out and "cannot be reached" in out
    code, out, _ = longspan("runs")
    assert code == 0 and "note: mine: cluster lab" in out
    code, out, err = longspan("logs", "mine")
    assert code == 0 and "step=3/8" in out and "this is from its folder" in err
    for verb in ("stop", "resume"):
        code, _, err = longspan(verb, "mine")
        assert code == 2 and "cannot be reached" in err, verb


def test_a_head_that_was_restarted_has_forgotten_the_job(longspan, dashboard, folder, mine):
    dashboard.jobs.clear()
    code, out, _ = longspan("status", "mine")
    assert code == 0 and out.startswith("mine: not known\n")
    assert "its head was restarted" in out and "longspan resume mine" in out
    assert longspan("logs", "mine")[0] == 2
    folder(3, None)
    assert longspan("status", "mine")[1].startswith("mine: not running; it ended without a word")
    assert "was submitted before" in longspan("submit", "smoke", "--run-id", "mine")[1]
    assert not dashboard.jobs
    assert longspan("resume", "mine")[0] == 0
    assert list(dashboard.jobs) == ["mine-2"]


def test_resume_is_another_job_for_the_same_folder(longspan, dashboard, mine, storage):
    code, _, err = longspan("resume", "mine")
    assert code == 2 and "mine is at work already: job mine-1 is running" in err
    assert "longspan stop mine" in err
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 75)
    code, out, _ = longspan("resume", "mine", "--exactness", "E1", "--from", "40")
    assert code == 0 and out.startswith("submitted mine-2\n  longspan status mine\n")
    first, second = (shlex.split(job["entrypoint"]) for job in dashboard.jobs.values())
    assert second == [*first, "--exactness", "E1", "--from", "40"]
    environments = [job["runtime_env"] for job in dashboard.jobs.values()]
    assert environments[0] == environments[1]
    assert [job.id for job in Registry().get("mine").submissions] == ["mine-1", "mine-2"]
    # Somebody resumed it from another machine: his job counts.
    dashboard.end(dashboard.jobs["mine-2"], "FAILED", 75)
    dashboard.jobs["mine-7"] = {**dashboard.jobs["mine-2"], "submission_id": "mine-7"}
    assert longspan("resume", f"{storage}/runs/mine")[0] == 0
    assert list(dashboard.jobs)[-1] == "mine-8"
    assert longspan("resume", "mine", "--exactness", "best")[0] == 2


def test_stop_waits_until_it_has_saved(longspan, dashboard, folder):
    directory = folder(3, None)
    EventLog(directory.events, 1).write("saving", step=3, stall_s=0.1)

    def save(job):
        def finish():
            EventLog(directory.events, 1).write("ended", code=75, how="stopped")
            dashboard.end(job, "STOPPED")

        later(0.2, finish)

    dashboard.on_stop = save
    begun = time.monotonic()
    code, out, err = longspan("stop", "mine")
    assert (code, err) == (0, "") and time.monotonic() - begun > 0.2
    asked, ended, stopped, *rest = out.splitlines()
    assert asked == "asked mine to save and stop; Ctrl-C ends the waiting, not the stop"
    assert ended.startswith("its job has ended after") and stopped == "mine has stopped"
    assert rest == ["go on with:", "  longspan resume mine"]


def test_a_job_that_was_killed_in_the_middle_of_its_save(longspan, dashboard, folder):
    """Ray kills what has not ended in time: what the save left does not count."""
    directory = folder(3, None)
    EventLog(directory.events, 1).write("saving", step=3, stall_s=0.1)
    (directory.checkpoints / "step-3.tmp-1").mkdir()
    code, out, _ = longspan("stop", "mine")
    assert code == 1
    assert "mine has ended before it had saved: no checkpoint was written" in out
    assert out.endswith("go on with:\n  longspan resume mine\n")
    assert longspan("status", "mine")[1].startswith("mine: stopped before it had saved\n")
    assert longspan("resume", "mine")[0] == 0


def test_a_run_that_completes_before_it_can_stop(longspan, dashboard, folder):
    dashboard.on_stop = lambda job: (folder(8, (0, "complete")), dashboard.end(job, "SUCCEEDED", 0))
    code, out, _ = longspan("stop", "mine")
    assert code == 0 and "mine is complete" in out and "resume" not in out


def test_what_is_not_running_cannot_be_stopped(longspan, dashboard, mine):
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 75)
    code, out, err = longspan("stop", "mine")
    assert (code, out) == (2, "")
    assert err == (
        "error: mine is not running: it is stopped\n  fix: go on with it: longspan resume mine\n"
    )
    dashboard.end(dashboard.jobs["mine-1"], "SUCCEEDED", 0)
    assert "mine is not running: it is complete" in longspan("stop", "mine")[2]
    dashboard.jobs.clear()
    assert "mine cannot be stopped: the cluster does not know" in longspan("stop", "mine")[2]


def test_ctrl_c_ends_the_waiting_only(longspan, dashboard, mine, monkeypatch):
    dashboard.on_stop = lambda job: None

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stop.time, "sleep", interrupt)
    assert longspan("stop", "mine")[0] == 130
    assert dashboard.jobs["mine-1"]["status"] == "RUNNING"


def test_runs_of_all_places_in_one_list(longspan, dashboard, folder, mine, tmp_path):
    folder(3, None)
    assert longspan("submit", "smoke", "--run-id", "other")[0] == 0
    leave_run(tmp_path / "user" / "here")
    assert longspan("resume", "./here", "--from", "99")[0] == 2  # recorded, though not resumed
    code, out, err = longspan("runs")
    assert (code, err) == (0, "")
    head, *rows = (line.split() for line in out.splitlines())
    assert head == ["run", "where", "state", "step", "loss", "started"]
    shown = {row[0].rpartition("-2")[0] or row[0]: row[1:5] for row in rows}
    assert shown == {
        "mine": ["lab", "running", "3/8", "3.6250"],
        "other": ["lab", "running", "-", "-"],
        "short": ["here", "stopped", "3/8", "3.6250"],
    }
    same = [line.split()[:5] for line in longspan("status")[1].splitlines()]  # the clock goes on
    assert same == [words[:5] for words in (head, *rows)]
    values = json.loads(longspan("runs", "--json")[1])
    assert {value["state"] for value in values} == {"running", "stopped"}


def test_a_list_asks_each_cluster_once(longspan, dashboard, mine):
    assert longspan("submit", "smoke", "--run-id", "other")[0] == 0
    dashboard.requests.clear()
    assert longspan("runs")[0] == 0
    assert [request.path for request in dashboard.requests] == ["/api/jobs/"]


@pytest.mark.parametrize("drips", [False, True])
def test_a_cluster_that_is_silent_or_drips_is_left_out(
    longspan, dashboard, clusters, folder, monkeypatch, drips
):
    """Every byte would let a socket wait anew."""
    folder(3)
    monkeypatch.setattr(standing, "_LIST_S", 0.3)
    monkeypatch.setattr(listing, "_PATIENCE_S", 0.3)
    over = threading.Event()

    def answer():
        with suppress(OSError):
            while not over.is_set():
                connection = server.accept()[0]
                while drips and not over.wait(0.05):
                    connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        here = leave_run(Path("here"), 3)
        Registry().write(Record("here", "short", 0.0, str(here.path)))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        clusters(lab={"address": address, "storage": "/shared/longspan"})
        said = {verb: longspan(verb, *more) for verb, *more in (["runs"], ["status", "mine"])}
        over.set()
    code, out, _ = said["runs"]
    rows = {line.split()[1]: line.split()[2] for line in out.splitlines()[1:3]}
    assert (code, rows) == (0, {"lab": "stopped", "here": "stopped"})
    assert "note: mine: cluster lab" in out and "gave no answer in 0.3 s\n" in out
    code, out, _ = said["status"]
    assert code == 0 and out.startswith("mine: stopped, and saved\n") and "step 3 of 8" in out
    assert "gave no answer in 0.3 s\n" in out


def test_checkpoints_are_looked_after_by_the_id(longspan, folder):
    directory = folder()
    code, said = longspan("checkpoint", "ls", "mine")[:2]
    assert code == 0 and f"{directory} has no checkpoint yet" in said
    for verb in (("verify", "mine"), ("show", "mi"), ("diff", "mine@3", "2")):
        code, _, said = longspan("checkpoint", *verb)
        assert code == 2 and "checkpoint" in said and str(directory) in said, said


def test_a_recipe_that_this_version_cannot_read(longspan, dashboard, mine):
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 1)
    (Registry().root / "mine.yaml").write_text("model: {hiden: 64}\n")
    code, _, err = longspan("resume", "mine")
    assert code == 2 and "the recipe of mine cannot be read by longspan" in err
    assert list(dashboard.jobs) == ["mine-1"]


def test_a_job_that_ray_cannot_start_says_why(longspan, dashboard, lab, monkeypatch):
    """A package that nobody keeps is gone before the job needs it."""
    assert longspan("submit", "smoke", "--run-id", "mine")[0] == 0
    assert dashboard.jobs["mine-1"]["status"] == "RUNNING"
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 1)
    dashboard.packages.clear()
    monkeypatch.setattr(Jobs, "upload", lambda *_: "gcs://gone.zip")
    assert longspan("resume", "mine")[0] == 0
    why = "Ray says: runtime_env setup failed: Failed to set up. ... OSError: no package"
    out = longspan("status", "mine")[1]
    assert out.startswith("mine: failed\n") and why in out
    assert longspan("logs", "mine") == (0, "", f"note: {why}\n")
    assert longspan("logs", "-f", "mine") == (1, "", f"\nmine: failed: {why}\n")


def test_a_run_that_failed_says_why(longspan, dashboard, folder):
    job = dashboard.jobs["mine-1"]
    dashboard.end(job, "FAILED", 2)
    assert longspan("status", "mine")[1].startswith(
        "mine: failed: its driver ended with exit code 2\n"
    )
    directory = folder(3, None)
    dashboard.end(job, "FAILED", -9)
    assert longspan("status", "mine")[1].startswith(
        "mine: failed: its driver was killed by signal 9\n"
    )
    EventLog(directory.events, 1).write("ended", code=1, how="failed", reason="it broke")
    assert longspan("status", "mine")[1].startswith("mine: failed: it broke\n")


def test_a_resume_that_fails_before_its_first_attempt_is_no_earlier_end(
    longspan, dashboard, folder
):
    """Its driver has left nothing in the folder, which still tells of the attempt before."""
    directory, now = folder(3), time.time()
    job = dashboard.jobs["mine-1"]
    job.update(start_time=1000 * (now + 600))
    dashboard.end(job, "FAILED", 2)
    job.update(end_time=1000 * (now + 601))
    assert longspan("runs")[1].splitlines()[1].split()[2] == "failed"
    said = "mine: failed: its driver ended with exit code 2\n"
    assert longspan("status", "mine")[1].startswith(said)
    EventLog(directory.events, 2).write("ended", code=1, how="failed", reason="it broke before")
    assert longspan("status", "mine")[1].startswith(said)
    # Somebody went on with it without this cluster.
    job.update(start_time=1000 * (now - 601), end_time=1000 * (now - 600))
    EventLog(directory.events, 3).write("ended", code=75, how="stopped")
    assert longspan("runs")[1].splitlines()[1].split()[2] == "stopped"


def test_a_run_that_was_stopped_while_it_waited_has_saved_nothing(longspan, dashboard, folder):
    directory = folder(0)
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 75)
    _, out, _ = longspan("status", "mine")
    assert out.startswith("mine: stopped before it had a checkpoint\n") and "no checkpoint" in out
    EventLog(directory.events, 2).write("step", **step_event(1))
    EventLog(directory.events, 2).write("ended", code=75, how="stopped")
    assert longspan("status", "mine")[1].startswith("mine: stopped, and saved\n")


def test_a_run_that_was_submitted_from_another_machine(
    longspan, dashboard, folder, storage, tmp_path, monkeypatch
):
    """Its folder is where its cluster keeps runs: it is resumed there, not here."""
    folder(3)
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 75)
    monkeypatch.setenv("LONGSPAN_HOME", str(tmp_path / "elsewhere"))
    for name in ("mine", f"{storage}/runs/mine"):
        _, out, _ = longspan("status", name)
        assert out.startswith("mine: stopped, and saved\n  cluster lab, job mine-1 failed ")
    assert longspan("status", "min")[0] == 2
    assert longspan("resume", f"{storage}/runs/mine")[0] == 0
    assert list(dashboard.jobs) == ["mine-1", "mine-2"]
    assert longspan("status", "min")[1].startswith("mine: running\n")
    (tmp_path / "clusters.yaml").write_text("clusters: 5")
    assert longspan("status", "other")[0] == 2
