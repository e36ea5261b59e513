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
        attempts: Launches that came to a step, the last one included.
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


def soak(runs: Kills, count: int, seed: int | str) -> Soaked:
    """Kill a run at `count` random times, and see that nothing is lost that may not be.

    One kill of four comes while an attempt starts. The others come within twice the checkpoints
    that an attempt may make if the run shall last for all kills.

    Raises:
        AssertionError: It ends otherwise than the unkilled run.
    """
    draw, kills, in_a_save = random.Random(seed), Counter[str](), 0
    starts_s, interval_s = _pace(runs)
    run_dir = runs.place("soak")
    for number in range(count):
        intervals = 2 * (runs.steps - newest_step(run_dir)) / runs.every / (count - number)
        steps = draw.random() >= 0.25
        seconds = draw.uniform(0, intervals * interval_s if steps else starts_s)
        last = min(newest_step(run_dir) + round(intervals * runs.every), runs.steps) - 1
        before = _unfinished(run_dir)
        moment = _Moment(run_dir, steps, seconds, last)
        kills[_kill_at(moment, runs, runs.launch(run_dir), draw)] += 1
        runs.assert_left_intact(run_dir)
        in_a_save += not _unfinished(run_dir) <= before
    lost = runs.assert_ends_like_the_unkilled(run_dir)
    told = steps_of(run_dir)
    attempts = len({step["attempt"] for step in told})
    return Soaked(dict(kills), attempts, runs.steps, len(told), lost, in_a_save)


class _Moment:
    """When to kill: some seconds after the launch or its first step, and no later than a step.

    Args:
        run_dir: Of the run, before the launch.
        steps: Whether the seconds begin with the first step.
        seconds: How many.
        last: The step at which it is time in any case: the run must not come to its end.
    """

    def __init__(self, run_dir: Path, steps: bool, seconds: float, last: int) -> None:
        self._events, self._last = run_dir / "events.jsonl", last
        self._size = self._events.stat().st_size if self._events.exists() else 0
        self._begun, self._seconds = None if steps else time.monotonic(), seconds

    def wait(self) -> None:
        """Return when it has come."""
        while not self._has_come():
            time.sleep(0.005)

    def _has_come(self) -> bool:
        step, now = self._told(), time.monotonic()
        if step is not None and self._begun is None:
            self._begun = now
        late = self._begun is not None and now >= self._begun + self._seconds
        return late or (step is not None and step >= self._last)

    def _told(self) -> int | None:
        """The last step that this attempt tells of; only the end of the events is read."""
        try:
            with self._events.open("rb") as file:
                file.seek(max(self._size, file.seek(0, os.SEEK_END) - 4096))
                found = re.findall(rb'"event": "step".*?"step": (\d+)', file.read())
        except FileNotFoundError:
            return None
        return int(found[-1]) if found else None


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


def _kill_at(moment: _Moment, runs: Kills, launch: Launch, draw: random.Random) -> str:
    """Launch, wait and kill. Returns whom."""
    victim, rank = draw.choice((ONE, ALL, LAUNCHER)), draw.randrange(2)
    pids = runs.forks.start(launch)
    moment.wait()
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
