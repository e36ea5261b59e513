"""Soak of a cluster: one run meets fault after fault, and ends as if there had been none."""

import contextlib
import json
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.trainer.observe.events import read_events
from support.cluster import Drive, LocalCluster
from support.cluster_faults import Scene, hang, kill_node, kill_rank, kill_worker, notice
from support.kills import tiny_settings
from support.unkilled import Reference

KILL_DRIVER, FULL_DISK = "kill_driver", "full_disk"
STRIKES: dict[str, Callable[[Scene], tuple[str, str]]] = {
    strike.__name__: strike for strike in (kill_rank, kill_worker, kill_node, hang, notice)
}
KINDS = (*STRIKES, KILL_DRIVER, FULL_DISK)
# A hang is told by what the attempt has done before; a disk is full when the run saves.
_WITH_STEPS = (hang.__name__, FULL_DISK)
_WARM_STEPS = 3
# Enough that ranks whose node or driver is gone are, too, before the run comes to its end.
_LEFT = 300
_WAIT_S = 300.0
_DISK_MB = 64


@dataclass(frozen=True)
class Plan:
    """What a soak is made of.

    Attributes:
        faults: How many.
        kinds: That are drawn from.
        every: Steps between checkpoints.
        apart: Steps from one fault to the next, in the mean.
        seed: Of kinds and moments.
        least: Seconds that anything may take before it is a hang.
        first: Seconds that something may take of which nothing is known yet.
        interval: Seconds between two reports of a node.
        preflight: Whether nodes are looked at before they are used.
    """

    faults: int
    kinds: tuple[str, ...]
    every: int
    apart: int
    seed: int
    least: float
    first: float
    interval: float
    preflight: bool

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.faults * self.apart + _LEFT

    def settings(self, texts: Path, where: Path | None = None) -> dict[str, Any]:
        """The run, with its checkpoints on a disk of their own or in its folder."""
        raw = tiny_settings(texts, 2 * self.steps, self.every)
        checkpoint = {"every": self.every, "keep": 1, "tries": 1, "misses": 1}
        checkpoint |= {} if where is None else {"where": str(where)}
        recovery = {
            "retries": {"infrastructure": 10 * self.faults + 10},
            "wait": 120,
            "hang": {"least": self.least, "first": self.first, "data": self.first},
        }
        return {
            **raw,
            "stages": raw["stages"][:1],
            "checkpoint": checkpoint,
            "recovery": recovery,
        }

    def options(self) -> tuple[str, ...]:
        """Of the driver."""
        look = () if self.preflight else ("--no-preflight",)
        return *look, "--interval", str(self.interval)


@dataclass(frozen=True)
class Struck:
    """A fault that has come.

    Attributes:
        kind: Which one.
        moment: `step`: between two steps of an attempt; `start`: before its first one.
        attempt: The one that it met.
        time: In unix seconds.
    """

    kind: str
    moment: str
    attempt: int
    time: float


class Disk:
    """A small disk that can be full; the machine must let us mount one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(folder)]
        subprocess.run(words, check=True, capture_output=True)
        self.folder, self._filler = folder, folder / "filler"

    def fill(self) -> None:
        """Nothing is free; called again, what has become free since is not."""
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            for size in (2**20, 2**12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        """What filled it is removed."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=False)


class Ledger:
    """Reads what a run tells, each line once.

    Attributes:
        attempt: The newest gang that was launched.
        steps: Events of the newest gang's steps.
        ended: How attempts have ended, by number.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""
        self.attempt = 0
        self.steps: list[dict[str, Any]] = []
        self.ended = dict[int, str]()

    def look(self) -> "Ledger":
        """Read on."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return self
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                self._see(json.loads(line))
        return self

    def _see(self, event: dict[str, Any]) -> None:
        if event["event"] == "launched":
            self.attempt, self.steps = event["attempt"], []
        elif event["event"] == "step":
            self.steps.append(event)
        elif event["event"] == "ended":
            self.ended[event["attempt"]] = event["how"]


class Soak:
    """One run on a cluster, and what strikes it.

    Args:
        cluster: Where; with one node more than the run needs, its nodes are replaced without haste.
        plan: What is to come.
        folder: For everything that is written.
        disk: That holds the checkpoints; None: the run's folder does.
    """

    def __init__(
        self, cluster: LocalCluster, plan: Plan, folder: Path, disk: Disk | None = None
    ) -> None:
        self._cluster, self._plan, self._disk = cluster, plan, disk
        self._settings = plan.settings(folder / "texts", disk and disk.folder / "checkpoints")
        self.run_dir = folder / "soak"
        self._draw = random.Random(plan.seed)
        self._ledger = Ledger(self.run_dir / "events.jsonl")
        self._spare = len(cluster.nodes) > 2
        self._short = False
        self.struck: list[Struck] = []
        self.began = time.time()
        self._drive = self._started()

    def run(self, say: Callable[[str], None]) -> None:
        """All faults, one after the other, and then the end.

        Args:
            say: Told of each fault.

        Raises:
            AssertionError: The run ends otherwise than it has to.
        """
        kinds = self._kinds()
        for number, kind in enumerate(kinds):
            moment = self._wait_for_moment(kind, len(kinds) - number)
            fault = self._strike(kind, moment)
            if self._ledger.ended.get(fault.attempt) == "complete":
                say(f"the run was faster than {kind}: {len(kinds) - number} faults are left out")
                break
            self.struck.append(fault)
            say(f"{number + 1} of {len(kinds)}: {kind} at a {moment} of attempt {fault.attempt}")
        assert self._drive.ends(900) == 0, self._drive.text()

    def close(self) -> None:
        """End the driver, if it has not ended."""
        if self._drive.process.poll() is None:
            self._drive.process.kill()
            self._drive.process.wait()

    def _kinds(self) -> list[str]:
        """Each as often as the others, in a random order."""
        plan = self._plan
        rounds = -(-plan.faults // len(plan.kinds))
        found = [
            kind for _ in range(rounds) for kind in self._draw.sample(plan.kinds, len(plan.kinds))
        ]
        return found[: plan.faults]

    def _started(self) -> Drive:
        return Drive(self._cluster, self._settings, self.run_dir, *self._plan.options())

    def _wait(self, what: Callable[[], Any]) -> None:
        """Wait until something is so; the driver must not end before."""
        deadline = time.monotonic() + _WAIT_S
        while True:
            gone = self._drive.process.poll() is not None
            if what():
                return
            assert not gone, self._drive.text()
            assert time.monotonic() < deadline, self._drive.text()
            time.sleep(0.01)

    def _wait_for_moment(self, kind: str, left: int) -> str:
        """Return when the next fault is to come."""
        ledger, plan, draw = self._ledger, self._plan, self._draw
        met = self.struck[-1].attempt if self.struck else 0
        self._wait(lambda: ledger.look().attempt > met)
        if draw.random() < 0.25 and kind not in _WITH_STEPS and met:
            share = draw.random()
            self._wait(lambda: len(self._drive.workers()) == 2 or ledger.look().steps)
            until = time.time() + share * self._start_s()
            self._wait(lambda: time.time() > until or ledger.look().steps)
            return "step" if ledger.steps else "start"
        self._wait(lambda: ledger.look().steps)
        if self._short:
            self._cluster.revive()
            self._short = False
        first = ledger.steps[0]["step"]
        last = plan.steps - _LEFT
        further = draw.uniform(_WARM_STEPS, max(_WARM_STEPS, 2 * (last - first) / left))
        until = min(first + round(further), last)
        self._wait(lambda: ledger.look().steps and ledger.steps[-1]["step"] >= until)
        time.sleep(draw.uniform(0, ledger.steps[-1]["step_s"]))
        return "step"

    def _start_s(self) -> float:
        """From the ranks' processes to a first step, about."""
        launched = 0.0
        for event in read_events(self.run_dir / "events.jsonl"):
            if event["event"] == "launched":
                launched = event["time"]
            elif event["event"] == "step":
                return event["time"] - launched
        return 0.0

    def _strike(self, kind: str, moment: str) -> Struck:
        drive, ledger = self._drive, self._ledger
        if kind in STRIKES:
            self._wait(lambda: len(drive.workers()) == 2)
        if kind == kill_node.__name__ and self._short:
            self._cluster.revive()
        fault = Struck(kind, moment, ledger.look().attempt, time.time())
        if kind == KILL_DRIVER:
            drive.process.kill()
            drive.process.wait()
            self._drive = self._started()
        elif kind == FULL_DISK:
            self._fill_the_disk()
            self._drive = self._started()
        else:
            STRIKES[kind](Scene(self._cluster, drive, fault.attempt))
            if kind == kill_node.__name__:
                self._short = self._spare
            if kind == kill_node.__name__ and not self._spare:
                self._cluster.revive()
            self._wait(lambda: fault.attempt in ledger.look().ended)
        return fault

    def _fill_the_disk(self) -> None:
        """The disk is full until the run has ended of it."""
        assert self._disk is not None
        deadline = time.monotonic() + _WAIT_S
        while self._drive.process.poll() is None:
            self._disk.fill()
            assert time.monotonic() < deadline, self._drive.text()
            time.sleep(0.01)
        code = self._drive.process.returncode
        assert code == 2, f"exit code {code}: {self._drive.text()}"
        assert "no space left" in self._drive.said(), self._drive.text()
        self._disk.free()

    def assert_nothing_lost(self, reference: Reference) -> int:
        """The weights are those of the run without faults, and so is every step.

        Returns:
            The most steps that one fault cost.
        """
        reference.assert_same_content(self.run_dir)
        return reference.assert_history(self.run_dir, self._plan.every)


def cold_start(cluster: LocalCluster, plan: Plan, folder: Path) -> float:
    """Seconds from a driver's start to the first step of a new run, which is ended then."""
    began = time.time()
    drive = Drive(cluster, plan.settings(folder.parent / "texts"), folder, *plan.options())
    try:
        ledger = Ledger(folder / "events.jsonl")
        drive.wait_for(lambda: ledger.look().steps)
        ranks = drive.workers()
    finally:
        drive.process.kill()
        drive.process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, "ranks outlive their driver"
        time.sleep(0.05)
    return ledger.steps[0]["time"] - began
