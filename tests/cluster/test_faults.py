"""Whatever happens to ranks, workers and nodes: the run begins again and ends bit-equal.

One run meets several faults, one after the other; which ones is drawn by day.
"""

import time
from collections.abc import Callable

from longspan.cluster.recovery import recoveries
from longspan.cluster.stacks import NO_RIGHTS
from support.cluster import Drive
from support.cluster_faults import (
    Scene,
    drain,
    hang,
    kill_node,
    kill_rank,
    kill_rank_beside_another,
    kill_worker,
    notice,
)
from support.cluster_runs import EVERY, cluster_run
from support.grid import sample

# Longer than a step on a busy machine may take, short enough to wait for.
HANG = {"least": 10, "first": 120, "data": 120}
NEED_A_SPARE = (kill_node, drain)
FAULTS: tuple[Callable, ...] = (
    kill_rank, kill_rank_beside_another, kill_worker, kill_node, hang, notice, drain,
)  # fmt: skip
STACKS = {"hang": 2, "kill_rank_beside_another": 1}
"""Ranks that show where they are, as they do not move and live."""


def test_a_run_that_meets_faults_ends_bit_equal(cluster, reference, texts, tmp_path):
    faults = sample("cluster faults", FAULTS, 1)
    cluster.nodes += [cluster.add_node() for fault in faults if fault in NEED_A_SPARE]
    started, struck = time.time(), []
    run = cluster_run(texts, recovery={"hang": HANG})
    drive = Drive(cluster, run, tmp_path / "run", "--no-preflight")
    for attempt, fault in enumerate(faults, 1):
        # The last one comes to ranks of different nodes that share sequences.
        stages = ("long",) if attempt == len(faults) else ("short", "long")
        drive.wait_for(lambda a=attempt, s=stages: _made(drive, a, s) > EVERY)
        began = time.time()
        cause, words = fault(Scene(cluster, drive, attempt))
        (end,) = drive.wait_for(
            lambda a=attempt: [e for e in drive.events("ended") if e["attempt"] == a]
        )
        struck.append((fault.__name__, cause, words, end, began))
    assert drive.ends() == 0, drive.text()
    reference.assert_same_content(drive.run_dir)
    reference.assert_history(drive.run_dir, EVERY)
    said, steps = drive.said(), drive.events("step")
    for attempt, (name, cause, words, end, began) in enumerate(struck, 1):
        assert end["how"] == "failed" and words in end["reason"], (name, end, said)
        assert f"({cause})" in said, (name, said)
        first, cold = (
            min(e["time"] for e in steps if e["attempt"] == number) for number in (attempt + 1, 1)
        )
        print(
            f"{name}: told after {end['time'] - began:.1f} s, next step after {first - began:.1f} s"
        )
        if name in STACKS:
            stacks = sorted(drive.run_dir.glob(f"logs/stack-attempt-{attempt}-rank-*.txt"))
            assert len(stacks) == STACKS[name]
            for stack in stacks:
                text = stack.read_text()
                assert "trainer/worker.py" in text or NO_RIGHTS in text, text
        if name == "hang":
            assert "recovery.hang.least" in said
        if name == "kill_node":
            assert first - began <= 1.5 * (cold - started), (first - began, cold - started)
        if name in ("kill_node", "drain"):
            out = [e for e in drive.events("excluded") if e["attempt"] == attempt]
            (out,) = [event for event in out if event["kind"] != "failures"]
            for later in drive.events("launched")[attempt:]:
                assert out["node"] not in later["nodes"]
    assert len(recoveries(drive.run_dir / "events.jsonl")) == len(faults)
    assert f"recovered {len(faults)} time" in said


def _made(drive, attempt, stages):
    """Steps that an attempt has made in one of some stages."""
    steps = drive.events("step")
    return sum(event["attempt"] == attempt and event["stage"] in stages for event in steps)
