"""`longspan logs`: what a run on a cluster has said."""

import threading
import time

import pytest
from longspan.cluster import output
from longspan.cluster.jobs import Jobs
from longspan.errors import ClusterError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(output, "_POLL_S", 0.02)
    monkeypatch.setattr(output, "_RETRY_S", 0.02)


def later(seconds: float, do) -> None:
    threading.Timer(seconds, do).start()


def test_logs_are_the_output_of_the_newest_job(longspan, dashboard, mine):
    dashboard.output["mine-1"] = (
        "2026-11-26 23:28:53,755\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        + dashboard.output["mine-1"]
    )
    assert longspan("logs", "mine") == (0, "", "note: mine (running) has said nothing yet\n")
    dashboard.output["mine-1"] += "first\n"
    assert longspan("logs", "mine") == (0, "first\n", "")
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 75)
    assert longspan("resume", "mine")[0] == 0
    assert longspan("logs", "mine")[1] == ""


@pytest.mark.parametrize(
    ("status", "exit_code", "code", "word"),
    [("SUCCEEDED", 0, 0, "complete"), ("FAILED", 75, 75, "stopped"), ("FAILED", 2, 2, "failed"),
     ("FAILED", None, 1, "failed"), ("STOPPED", None, 75, "stopped")],
)  # fmt: skip
def test_following_ends_with_the_run(longspan, dashboard, mine, status, exit_code, code, word):
    job = dashboard.jobs["mine-1"]

    def work():
        for number in range(5):
            time.sleep(0.05)
            dashboard.output["mine-1"] += f"step={number}\n"
        dashboard.end(job, status, exit_code)

    later(0, work)
    found, out, err = longspan("logs", "-f", "mine")
    assert (found, err) == (code, f"\nmine: {word}\n")
    assert out == "".join(f"step={n}\n" for n in range(5))


def test_a_connection_that_breaks_off_loses_and_repeats_nothing(longspan, dashboard, mine):
    dashboard.output["mine-1"] += "half of a"
    dashboard.breaks_off = 3

    def work():
        dashboard.output["mine-1"] += " line\nlast\n"
        dashboard.end(dashboard.jobs["mine-1"], "SUCCEEDED", 0)

    later(0.4, work)
    code, out, _ = longspan("logs", "-f", "mine")
    assert code == 0
    assert out == "half of a line\nlast\n"


@pytest.mark.parametrize("breaks", [False, True])
def test_a_run_that_says_nothing_for_long_is_followed_on(
    longspan, dashboard, mine, monkeypatch, breaks
):
    """Something in between may end a quiet stream again and again: that is no failure."""
    monkeypatch.setattr(output, "_RETRIES", 2)
    streams = 0

    def follow(self, submission):
        nonlocal streams
        streams += 1
        if streams == 6:
            dashboard.output["mine-1"] += "at last\n"
            dashboard.end(dashboard.jobs["mine-1"], "SUCCEEDED", 0)
        if breaks:
            raise ClusterError("the stream broke", "ask again")
        return iter(())

    monkeypatch.setattr(Jobs, "follow", follow)
    assert longspan("logs", "-f", "mine")[:2] == (0, "at last\n")


def test_the_last_words_are_printed_also_if_the_stream_ends_before(longspan, dashboard, mine):
    dashboard.withholds = len("rd\nerror: too few nodes\n")

    def work():
        dashboard.output["mine-1"] += "half a word\nerror: too few nodes\n"
        dashboard.end(dashboard.jobs["mine-1"], "FAILED", 2)

    later(0.1, work)
    assert longspan("logs", "-f", "mine")[:2] == (2, "half a word\nerror: too few nodes\n")


def test_a_cluster_that_goes_down_ends_the_following_in_the_end(
    longspan, dashboard, mine, monkeypatch
):
    monkeypatch.setattr(output, "_RETRIES", 2)
    dashboard.output["mine-1"] += "first\n"
    later(0.3, dashboard.stop)
    code, out, err = longspan("logs", "-f", "mine")
    assert code == 2 and "cluster lab" in err and out == "first\n"


def test_files_of_ranks_are_where_the_folder_is(longspan, mine, folder):
    code, _, err = longspan("logs", "mine", "--rank", "1")
    assert code == 2 and "is not visible from here" in err
    directory = folder(3)
    code, _, err = longspan("logs", "mine", "--rank", "1")
    assert code == 2 and "has no log of rank 1" in err and "no logs of ranks" in err
    (directory.logs / "rank-0.log").write_text("hello\n")
    assert longspan("logs", "mine", "--rank", "0")[:2] == (0, "hello\n")
    assert "there are logs of ranks 0" in longspan("logs", "mine", "--rank", "1")[2]
