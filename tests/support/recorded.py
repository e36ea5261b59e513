"""Run folders as runs leave them, without training."""

import time
from pathlib import Path

from longspan.trainer.observe.events import EventLog
from longspan.trainer.run_directory import RunDirectory, create_or_open
from support.short_run import short_run


def step_event(step: int, steps: int = 8, **changes) -> dict:
    """The fields of a `step` event."""
    return {
        "step": step, "steps": steps, "stage": "short", "stage_step": step, "stage_steps": steps,
        "tokens": 1024 * step, "loss": 4.0 - step / 8, "grad_norm": 1.0, "lr": 1e-3,
        "tokens_per_s": 512.0, "step_s": 2.0, **changes,
    }  # fmt: skip


def leave_run(path: Path, steps: int = 3, end: tuple[int, str] | None = (75, "stopped"),
              run=None, name: str = "short") -> RunDirectory:  # fmt: skip
    """A folder whose newest attempt did some steps and ended in a way; None: it did not end."""
    directory = create_or_open(path, run or short_run(), name)
    log = EventLog(directory.events)
    log.write("launched", ranks=1, pid=1)
    log.write("run_started", steps=8, stages=[{"name": "short", "steps": 8, "tokens": 8192}])
    log.write("stage_started", stage="short", index=0, length=256, steps=8)
    for step in range(1, steps + 1):
        log.write("step", **step_event(step))
    if end is not None:
        log.write("ended", code=end[0], how=end[1])
    log.close()
    if end is not None and end[0] == 0:
        directory.mark_complete({"tokens": 8192, "wall_s": 1.0, "finished": time.time()})
    return directory
