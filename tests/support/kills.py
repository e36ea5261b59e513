"""Kills: a tiny run that is killed at one point, resumed, and held against the unkilled run."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longspan.trainer.checkpoint.folders import LATEST
from longspan.trainer.observe.events import read_events
from support.faults import ALL, HALF, LAUNCHER, ONE, OTHER, Fault, Pids, Point, read_trace
from support.forks import STARTING, Forks, Launch
from support.unkilled import Reference, committed, newest_step

STORE = "store"
_SPAWNED = """
import json, sys
from pathlib import Path
from longspan.trainer.launch import train
from longspan.trainer.settings import RunSettings
sys.exit(train(RunSettings.model_validate(json.loads(sys.argv[1])), "tiny", Path(sys.argv[2])))
"""


def environment(cache: Path) -> dict[str, str]:
    """Of launches: no GPU, one thread, nothing that goes elsewhere."""
    own = {"LONGSPAN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return {**os.environ, **own, "CUDA_VISIBLE_DEVICES": ""}


def tiny_settings(texts: Path, steps: int, every: int) -> dict[str, Any]:
    """Two data ranks for half of the steps, then two context ranks; `texts` is filled."""
    draw, words = random.Random(0), [f"w{number}" for number in range(40)]
    texts.mkdir(parents=True, exist_ok=True)
    for number in range(120):
        text = " ".join(draw.choice(words) for _ in range(60))
        (texts / f"{number}.txt").write_text(text)
    short = {
        "name": "short",
        "length": 32,
        "tokens": steps // 2 * 128,
        "batch_tokens": 128,
        "data": {"sources": [{"kind": "text", "paths": [str(texts)]}], "held_out": 0.1},
        "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
    }
    parallel = {"context": 2, "canary": False}
    return {
        "seed": 5,
        "ranks": 2,
        "precision": "fp32",
        "model": {"hidden": 32, "layers": 2, "heads": 4, "query_groups": 2, "ffn_hidden": 48},
        "tokenizer": {"kind": "train", "vocab": 300},
        "stages": [short, {**short, "name": "long", "length": 64, "parallel": parallel}],
        "checkpoint": {"every": every, "keep": 1},
        "evaluation": {"sequences": 1, "documents": 0},
        "telemetry": {"every": 0},
        "tracking": {"wandb": "off"},
    }


@dataclass(frozen=True)
class Case:
    """A kill: where, who, and whether it comes to a run that was killed in a save before."""

    fault: Fault
    again: bool

    def __str__(self) -> str:
        point = self.fault.point
        again = "resumed, " if self.again else ""
        at = f"{point.when} {point.label} (time {self.fault.nth})"
        return f"{again}{point.role} {at}: kill {self.fault.victim}"


@dataclass(frozen=True)
class Outcome:
    """What a kill did.

    Attributes:
        exit: The exit code of the launcher that was killed or lost a rank.
        left: The step of the newest checkpoint then.
        lost: Steps made once more.
    """

    exit: int
    left: int
    lost: int


class Kills:
    """Tiny runs in a folder, killed and resumed.

    Args:
        folder: An empty one.
        steps: Of a run, over two stages.
        every: Steps between checkpoints.
        outside: Keep checkpoints beside the run's folder, not in it.
    """

    def __init__(self, folder: Path, steps: int = 6, every: int = 2, outside: bool = False) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.settings = tiny_settings(folder / "texts", steps, every)
        if outside:
            self.settings["checkpoint"]["where"] = f"../{STORE}"
        self.patience_s = 180.0 + steps
        self.environment = environment(folder / "cache")
        self.forks = Forks(self.environment)

    @cached_property
    def reference(self) -> Reference:
        """The unkilled run, by processes that are spawned and not forked."""
        run_dir = self.folder / "reference" / "run"
        checkpoint = {**self.settings["checkpoint"], "keep": self.steps}
        settings = {**self.settings, "checkpoint": checkpoint}
        done = subprocess.run(
            [sys.executable, "-c", _SPAWNED, json.dumps(settings), str(run_dir)],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Reference(run_dir)

    @cached_property
    def straight(self) -> tuple[Path, dict[Point, int]]:
        """The run as it shall be killed, unkilled, and its points with how often they come."""
        run_dir = self.place("straight")
        return run_dir, self._trace(run_dir)

    @cached_property
    def killed(self) -> tuple[Path, dict[Point, int]]:
        """A run that was killed in its last save, and the points of resuming it in a stage."""
        halves = {
            point: count
            for point, count in self.straight[1].items()
            if point.when == HALF and "/step-N" in point.label
        }
        busiest = max(halves, key=halves.__getitem__)
        run_dir, kept = self.place("case"), self.place("killed").parent
        self._strike(run_dir, Fault(busiest, halves[busiest], ALL))
        shutil.copytree(run_dir.parent, kept, dirs_exist_ok=True)
        return kept, self._trace(run_dir)

    def cases(self, but: Collection[str] = ()) -> Iterator[Case]:
        """All kills, without those that would only repeat others, and without some labels."""
        points, again = (
            {point: count for point, count in found.items() if point.label not in but}
            for found in (self.straight[1], self.killed[1])
        )
        for point, count in points.items():
            one = () if point.role == "launcher" else (ONE, OTHER)
            for victim in (*one, ALL, LAUNCHER):
                yield Case(Fault(point, count, victim), again=False)
            if count > 1:
                yield Case(Fault(point, 1, ALL), again=False)
        for point, count in again.items():
            if point.label.startswith(STARTING) or point not in points:
                one = () if point.role == "launcher" else (ONE,)
                for victim in (*one, ALL, LAUNCHER):
                    yield Case(Fault(point, count, victim), again=True)

    def assert_survives(self, case: Case, patch: str | None = None) -> Outcome:
        """Kill a run, look at what is left, resume it, and compare all of it with the reference."""
        kept = self.killed[0] if case.again else None
        run_dir = self.place("case")
        if kept is not None:
            # In its old place: a store outside of it knows where its run is.
            shutil.copytree(kept, run_dir.parent, dirs_exist_ok=True)
        code = self._strike(run_dir, case.fault, patch)
        self.assert_left_intact(run_dir)
        left = newest_step(run_dir)
        return Outcome(code, left, self.assert_ends_like_the_unkilled(run_dir))

    def assert_left_intact(self, run_dir: Path) -> None:
        """What was saved before a kill is there after it."""
        self.reference.assert_same_content(run_dir)
        events = read_events(run_dir / "events.jsonl")
        saved = max((event["step"] for event in events if event["event"] == "saved"), default=0)
        left = newest_step(run_dir)
        assert left >= saved, f"the newest that is left is step {left}, {saved} had been saved"

    def assert_ends_like_the_unkilled(self, run_dir: Path) -> int:
        """Resume a run to its end. Returns the most steps that a kill cost."""
        resumed = self.launch(run_dir)
        assert self.forks.run(resumed, self.patience_s) == 0, output(resumed)
        assert newest_step(run_dir) == self.steps
        self.reference.assert_same_content(run_dir)
        lost = self.reference.assert_history(run_dir, self.every)
        newest = committed(run_dir)[-1]
        assert (newest.parent / LATEST).read_text().strip() == newest.name
        strange = _files(run_dir) ^ _files(self.straight[0])
        assert not strange, f"left over or missing: {sorted(strange)}"
        return lost

    def points(self, patch: str | None = None) -> dict[Point, int]:
        """The points of a whole run under a patch."""
        return self._trace(self.place("patched"), patch)

    def close(self) -> None:
        """End the fork server."""
        self.forks.close()

    def place(self, name: str) -> Path:
        """Where a new run can be made, in an empty folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name / "run"

    def launch(self, run_dir: Path, **options: Any) -> Launch:
        """A launch that is traced."""
        control = run_dir.parent / "control"
        roots = [run_dir, run_dir.parent / STORE]
        return Launch(run_dir, self.settings, control, roots, **options)

    def _trace(self, run_dir: Path, patch: str | None = None) -> dict[Point, int]:
        launch = self.launch(run_dir, patch=patch)
        assert self.forks.run(launch, self.patience_s) == 0, output(launch)
        return dict(read_trace(launch.control)[0])

    def _strike(self, run_dir: Path, fault: Fault, patch: str | None = None) -> int:
        launch = self.launch(run_dir, fault=fault, patch=patch)
        pids = self.forks.start(launch)
        code = self.forks.wait(self.patience_s)
        assert read_trace(launch.control)[1], f"not reached: {fault}\n{output(launch)}"
        assert_ended(pids)
        return code


def assert_ended(pids: Pids, seconds: float = 10) -> None:
    """No rank outlives its launcher."""
    deadline = time.monotonic() + seconds
    while any(map(_alive, pids.ranks)):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.01)


def _files(run_dir: Path) -> set[str]:
    """What lies in a run's folder and its store, without what ranks said when they failed."""
    folders = run_dir, run_dir.parent / STORE
    found = [path for folder in folders for path in folder.rglob("*")]
    return {str(path.relative_to(run_dir.parent)) for path in found if "failure" not in path.name}


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def output(launch: Launch) -> str:
    """What a launcher and its ranks said."""
    logs = [launch.control / "output.log", *launch.run_dir.glob("logs/*")]
    return "\n".join(log.read_text() for log in logs if log.is_file())


def as_row(case: Case, outcome: Outcome | None = None) -> dict[str, Any]:
    """A case and its outcome, for a table."""
    fault = {"nth": case.fault.nth, "killed": case.fault.victim, "resumed": case.again}
    return {**asdict(case.fault.point), **fault, **(asdict(outcome) if outcome else {})}
