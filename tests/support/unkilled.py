"""Unkilled: what a run that nobody killed has and tells, and how another one is held against it."""

from pathlib import Path
from typing import Any, get_args

import torch
from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.folders import step_of
from longspan.trainer.checkpoint.manifest import damages, read_manifest
from longspan.trainer.checkpoint.store import open_store
from longspan.trainer.checkpoint.stored import Kind, StoredState
from longspan.trainer.observe.events import read_events
from longspan.trainer.run_directory import RunDirectory
from torch import Tensor


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


def committed(run_dir: Path) -> list[Path]:
    """The complete checkpoints of what may not be a run yet, oldest first."""
    directory = RunDirectory(run_dir)
    if not directory.is_run():
        return []
    store = open_store(directory.load_settings().checkpoint.where, run_dir)
    return [Path(store.root) / name for name in store.committed()]


def newest_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    found = committed(run_dir)
    return step_of(found[-1].name) if found else 0


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
        self._folders = {step_of(folder.name): folder for folder in committed(run_dir)}
        self.steps = {told["step"]: told for told in steps_of(run_dir)}

    def assert_same_content(self, run_dir: Path) -> None:
        """The newest checkpoint is intact: bit by bit that of the unkilled run at its step."""
        for newest in committed(run_dir)[-1:]:
            found, wanted = map(content, (newest, self._folders[step_of(newest.name)]))
            _assert_equal(found, wanted, newest.name)

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


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], name: str) -> None:
    assert found.keys() == wanted.keys()
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different, f"{name} has other values in {different}"
