"""Kills: a tiny run that is killed at one point, resumed, and held against the unkilled run."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.manifest import damages, read_manifest
from longspan.trainer.checkpoint.stored import Kind, StoredState
from longspan.trainer.observe.events import read_events
from longspan.trainer.run_directory import RunDirectory
from support.faults import ALL, HALF, LAUNCHER, ONE, OTHER, Fault, Pids, Point, read_trace
from support.forks import STARTING, Forks, Launch
from torch import Tensor

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


def content(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, moments and counts of updates, whole, whatever the layout was.

    Raises:
        AssertionError: The checkpoint is not what was written.
    """
    files = CheckpointFiles.of(checkpoint)
    try:
        found = damages(files, read_manifest(files))
        assert not found, f"{checkpoint.name} is not intact: {found}"
        state = StoredState(files)
        counts = {name: torch.tensor(count) for name, count in state.index.steps.items()}
        whole = {f"{kind} {n}": state.full(n, kind) for n in counts for kind in get_args(Kind)}
    except CheckpointError as error:
        raise AssertionError(f"{checkpoint.name} is not intact: {error}") from error
    return whole | counts


def newest_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    return RunDirectory(run_dir).newest_checkpoint_step() or 0


def steps_of(run_dir: Path, *more: str) -> list[dict[str, Any]]:
    """The steps that a run tells of, repeated ones included, without what a clock decides."""
    kept = ("step", "stage", "stage_step", "tokens", "loss", "grad_norm", "lr", "attempt", *more)
    events = read_events(run_dir / "events.jsonl")
    return [{name: e[name] for name in kept} for e in events if e["event"] == "step"]


class Reference:
    """An unkilled run that kept all of its checkpoints.

    Attributes:
        steps: What its steps told.
    """

    def __init__(self, run_dir: Path) -> None:
        folders = RunDirectory(run_dir).checkpoints.glob("step-*")
        self._folders = {int(folder.name[5:]): folder for folder in folders}
        self.steps = {told["step"]: told for told in steps_of(run_dir)}

    def assert_same_content(self, run_dir: Path) -> None:
        """The newest checkpoint is intact: bit by bit that of the unkilled run at its step."""
        newest = RunDirectory(run_dir).newest_checkpoint()
        if newest is None:
            return
        found, wanted = map(content, (newest, self._folders[int(newest.name[5:])]))
        assert found.keys() == wanted.keys()
        different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        assert not different, f"{newest.name} has other values in {different}"

    def assert_history(self, run_dir: Path, every: int) -> int:
        """All attempts together made each step, each time alike, and lost no more than they may.

        Returns:
            The most steps that one kill cost.
        """
        told, lost, newest = steps_of(run_dir), 0, 0
        for before, now in zip([None, *told], told, strict=False):
            same = before is not None and before["attempt"] == now["attempt"]
            if same:
                assert now["step"] == newest + 1, f"step {now['step']} follows {newest}"
            else:
                assert 1 <= now["step"] <= newest + 1, f"{now['step']} after {newest}: skipped"
                lost = max(lost, newest - now["step"] + 1)
            newest = now["step"]
            wanted = {**self.steps[newest], "attempt": now["attempt"]}
            assert now == wanted, f"step {newest} was another one: {now}, not {wanted}"
        assert newest == max(self.steps), f"the run ends at step {newest}"
        # The interval, and a save that is still in flight when the next one is due.
        assert lost <= 2 * every, f"{lost} steps were lost"
        return lost


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
    """

    def __init__(self, folder: Path, steps: int = 6, every: int = 2) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.settings = tiny_settings(folder / "texts", steps, every)
        self.environment = environment(folder / "cache")
        self.forks = Forks(self.environment)

    @cached_property
    def reference(self) -> Reference:
        """The unkilled run, by processes that are spawned and not forked."""
        run_dir = self.folder / "reference" / "run"
        settings = {**self.settings, "checkpoint": {"every": self.every, "keep": self.steps}}
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
        """A run that was killed in the midst of a checkpoint, and the points of resuming it."""
        halves = {
            point: count
            for point, count in self.straight[1].items()
            if point.when == HALF and "checkpoints/step-N" in point.label
        }
        busiest = max(halves, key=halves.__getitem__)
        run_dir = self.place("killed")
        self._strike(run_dir, Fault(busiest, -(-halves[busiest] * 3 // 4), ALL))
        again = self.place("killed-again")
        shutil.copytree(run_dir, again)
        return run_dir, self._trace(again)

    def cases(self) -> Iterator[Case]:
        """All kills, without those that would only repeat others."""
        points, again = self.straight[1], self.killed[1]
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
        run_dir = self.place("case")
        if case.again:
            shutil.copytree(self.killed[0], run_dir)
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
        assert self.forks.run(resumed) == 0, output(resumed)
        assert newest_step(run_dir) == self.steps
        self.reference.assert_same_content(run_dir)
        lost = self.reference.assert_history(run_dir, self.every)
        strange = set(_files(run_dir)) ^ set(_files(self.straight[0]))
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
        return Launch(run_dir, self.settings, control, [run_dir], **options)

    def _trace(self, run_dir: Path, patch: str | None = None) -> dict[Point, int]:
        launch = self.launch(run_dir, patch=patch)
        assert self.forks.run(launch) == 0, output(launch)
        return dict(read_trace(launch.control)[0])

    def _strike(self, run_dir: Path, fault: Fault, patch: str | None = None) -> int:
        launch = self.launch(run_dir, fault=fault, patch=patch)
        pids = self.forks.start(launch)
        code = self.forks.wait()
        assert read_trace(launch.control)[1], f"not reached: {fault}\n{output(launch)}"
        assert_ended(pids)
        return code


def assert_ended(pids: Pids, seconds: float = 10) -> None:
    """No rank outlives its launcher."""
    deadline = time.monotonic() + seconds
    while any(map(_alive, pids.ranks)):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.01)


def _files(run_dir: Path) -> list[str]:
    """What lies in a run's folder, without what ranks said when they failed."""
    names = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*")]
    return sorted(name for name in names if "failure" not in name)


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
