"""Soak: one run that is killed at random times, again and again, and then ends as if it had not."""

import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.faults import ALL, LAUNCHER, ONE
from support.forks import Launch
from support.kills import Kills, assert_ended, output
from support.unkilled import newest_step, steps_of


@dataclass(frozen=True)
class Soaked:
    """What came of a soak.

    Attributes:
        kills: By victim.
        attempts: Launches that came to a step or beyond, the last one included.
        steps: Of the run.
        made: Steps made in all attempts together, repeated ones included.
        lost: The most that one kill cost.
        in_a_save: Kills that left an unfinished checkpoint.
    """

    kills: dict[str, int]
    attempts: int
    steps: int
    made: int
    lost: int
    in_a_save: int


def soak(runs: Kills, count: int, seed: int) -> Soaked:
    """Kill a run at `count` random times, and see that nothing is lost that may not be.

    A kill comes at any time between the launch and twice the checkpoints that an attempt may make
    if the run shall last for all kills; at the latest with the step before the last of these.

    Raises:
        AssertionError: It ends otherwise than the unkilled run.
    """
    draw, kills, in_a_save = random.Random(seed), Counter[str](), 0
    run_dir, (starts_s, interval_s) = runs.place("soak"), _pace(runs)
    for number in range(count):
        intervals = (runs.steps - newest_step(run_dir)) / runs.every / (count - number)
        seconds = draw.uniform(0, starts_s + 2 * intervals * interval_s)
        before = _unfinished(run_dir)
        last = min(newest_step(run_dir) + round(2 * intervals * runs.every), runs.steps) - 1
        kills[_kill_after(runs, runs.launch(run_dir), seconds, last, draw)] += 1
        runs.assert_left_intact(run_dir)
        in_a_save += not _unfinished(run_dir) <= before
    lost = runs.assert_ends_like_the_unkilled(run_dir)
    told = steps_of(run_dir)
    attempts = len({step["attempt"] for step in told})
    return Soaked(dict(kills), attempts, runs.steps, len(told), lost, in_a_save)


def _pace(runs: Kills) -> tuple[float, float]:
    """Seconds from a launch to its first step, and of an interval between checkpoints."""
    begun = time.time()
    run_dir = runs.place("pace")
    launch = runs.launch(run_dir)
    pids = runs.forks.start(launch)
    wanted = min(runs.steps, 2 * runs.every)
    while len(steps_of(run_dir)) < wanted:
        assert time.time() < begun + 120, output(launch)
        time.sleep(0.02)
    os.kill(pids.launcher, signal.SIGKILL)
    runs.forks.wait(runs.patience_s)
    assert_ended(pids)
    times = [event["time"] for event in steps_of(run_dir, "time")]
    return times[0] - begun, (times[wanted - 1] - times[0]) * runs.every / (wanted - 1)


def _kill_after(runs: Kills, launch: Launch, seconds: float, last: int, draw: random.Random) -> str:
    """Launch, wait for a time or a step, and kill. Returns whom."""
    victim, rank = draw.choice((ONE, ALL, LAUNCHER)), draw.randrange(2)
    pids = runs.forks.start(launch)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _told(launch.run_dir) < last:
        time.sleep(0.005)
    if victim == LAUNCHER:
        os.kill(pids.launcher, signal.SIGKILL)
    else:
        while len(pids.ranks) < 2:
            time.sleep(0.005)
        for pid in pids.ranks[rank : rank + 1] if victim == ONE else pids.ranks:
            os.kill(pid, signal.SIGKILL)
    code = runs.forks.wait(runs.patience_s)
    assert code == (-signal.SIGKILL if victim == LAUNCHER else 1), output(launch)
    assert_ended(pids)
    return victim


def _unfinished(run_dir: Path) -> set[int]:
    """Checkpoints that somebody was writing or removing; by inode, as names are used again."""
    return {folder.stat().st_ino for folder in run_dir.glob("checkpoints/*tmp*")}


def _told(run_dir: Path) -> int:
    """The last step that the events tell of; only their end is read."""
    try:
        with (run_dir / "events.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            found = re.findall(rb'"event": "step".*?"step": (\d+)', file.read())
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0
