"""How a run on a cluster ends that does not come to its end at once; drawn by day."""

import os
import signal
import subprocess
import time

import pytest
from support.cluster import Drive, kill
from support.cluster_runs import EVERY, STEPS, cluster_run
from support.grid import sample
from support.unkilled import newest_step

QUICK = ("--no-preflight",)


def made(drive):
    return len(drive.events("step"))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_a_users_error_ends_the_run_at_once(cluster, reference, texts, tmp_path):
    nothing = {"sources": [{"kind": "text", "paths": [str(tmp_path / "nothing.txt")]}]}
    stages = [{**stage, "data": nothing} for stage in cluster_run(texts)["stages"]]
    drive = Drive(cluster, cluster_run(texts, stages=stages), tmp_path / "run", *QUICK)
    assert drive.ends() == 2, drive.text()
    said = drive.said()
    assert "error:" in said and "nothing.txt" in said and "fix:" in said
    assert "Traceback" not in said and "retry" not in said, said
    assert len(drive.events("launched")) == 1


def assert_a_full_disk_ends_the_run_at_once(cluster, reference, texts, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk needs the right to mount one")
    try:
        full = {"every": EVERY, "where": str(disk), "tries": 1, "misses": 1}
        drive = Drive(cluster, cluster_run(texts, checkpoint=full), tmp_path / "run", *QUICK)
        assert drive.ends() == 2, drive.text()
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    said = drive.said()
    assert "no space left" in said and "free some space" in said
    assert "Traceback" not in said and "retry" not in said, said
    assert len(drive.events("launched")) == 1


def assert_a_spent_budget_ends_the_run(cluster, reference, texts, tmp_path):
    recovery = {"retries": {"infrastructure": 0}}
    drive = Drive(cluster, cluster_run(texts, recovery=recovery), tmp_path / "run", *QUICK)
    drive.wait_for(lambda: made(drive) > EVERY)
    kill(drive.workers()[1])
    assert drive.ends() == 1, drive.text()
    said = drive.said()
    assert "recovery.retries.infrastructure" in said and "rank 1 was killed by SIGKILL" in said
    assert "longspan resume run" in said
    assert len(drive.events("launched")) == 1


def assert_a_stopped_and_a_killed_driver_lose_nothing(cluster, reference, texts, tmp_path):
    drive = Drive(cluster, cluster_run(texts), tmp_path / "run", *QUICK)
    drive.wait_for(lambda: made(drive) > EVERY)
    other = Drive(cluster, cluster_run(texts), tmp_path / "run", *QUICK)
    assert other.ends() == 2 and "is in use by process" in other.said()
    drive.process.send_signal(signal.SIGTERM)
    assert drive.ends() == 75, drive.text()
    assert newest_step(drive.run_dir) == max(e["step"] for e in drive.events("step"))
    second = Drive(cluster, cluster_run(texts), tmp_path / "run", *QUICK)
    second.wait_for(lambda: any(e["attempt"] == 2 for e in second.events("step")))
    ranks = second.workers()
    assert len(ranks) == 2
    second.process.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, ranks.values())):
        assert time.monotonic() < deadline, "ranks outlive their driver"
        time.sleep(0.05)
    third = Drive(cluster, cluster_run(texts), tmp_path / "run", *QUICK)
    assert third.ends() == 0, third.text()
    reference.assert_same_content(third.run_dir)
    reference.assert_history(third.run_dir, EVERY)


def assert_fewer_ranks_do_where_they_may(cluster, reference, texts, tmp_path):
    # One rank cannot share sequences with another one, as the second stage wants it.
    (short, _) = cluster_run(texts)["stages"]
    short = {**short, "tokens": 2 * short["tokens"]}
    changes = {"ranks_at_least": 1, "stages": [short], "recovery": {"wait": 3}}
    run, more = cluster_run(texts, **changes), QUICK
    drive = Drive(cluster, run, tmp_path / "run", *more)
    drive.wait_for(lambda: made(drive) > EVERY)
    cluster.kill_node(cluster.nodes[1])
    assert drive.ends() == 2, drive.text()
    said = drive.said()
    (ended,) = (event for event in drive.events("ended") if event["attempt"] == 2)
    assert ended["reason"].startswith("too few nodes after 3 s")
    assert "too few nodes after 3 s (recovery.wait): the run wants 2 ranks, 1 at least, the" in said
    assert "the nodes have 1 free cores" in said
    assert "was lost" in said and "--exactness E1" in said
    again = Drive(cluster, run, tmp_path / "run", *more, "--exactness", "E1")
    assert again.ends() == 0, again.text()
    said = again.said()
    assert "with 1 rank on 1 node" in said and "exactness E1" in said
    assert newest_step(again.run_dir) == STEPS
    losses = {e["step"]: e["loss"] for e in again.events("step") if e["step"] <= STEPS // 2}
    wanted = {step: reference.steps[step]["loss"] for step in range(1, STEPS // 2 + 1)}
    assert losses == pytest.approx(wanted, rel=1e-4)


ENDINGS = (
    assert_a_users_error_ends_the_run_at_once,
    assert_a_full_disk_ends_the_run_at_once,
    assert_a_spent_budget_ends_the_run,
    assert_a_stopped_and_a_killed_driver_lose_nothing,
    assert_fewer_ranks_do_where_they_may,
)


@pytest.mark.parametrize(
    "assert_ending", sample("cluster endings", ENDINGS, 1), ids=lambda e: e.__name__
)
def test_a_run_ends_as_it_should(cluster, reference, texts, tmp_path, assert_ending):
    assert_ending(cluster, reference, texts, tmp_path)
