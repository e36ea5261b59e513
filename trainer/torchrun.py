"""A run whose ranks torchrun started: every rank finds the same folder, then works."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..errors import RunError
from .checkpoint.choice import refuse_complete, set_aside_newer
from .checkpoint.store import open_store
from .failure import COMPLETE
from .observe.attempts import attempt_in_environment, ended, launched
from .observe.summary import render_complete
from .observe.wandb_account import check_tracking
from .plan import model_ranks
from .run_directory import RunDirectory, check_same_recipe, create_or_open
from .settings import RunSettings

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_POLL_S = 0.2
_WAIT_S = 120.0


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} <= os.environ.keys()


def join_torchrun(run: RunSettings, name: str, run_dir: Path, from_step: int | None = None) -> int:
    """Work as the rank that the environment names; rank 0 creates the folder.

    Returns:
        The rank's exit code.

    Raises:
        RunError: The world does not fit the recipe, or the folder cannot be used.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _check_world(run, world)
    if rank == 0:
        check_tracking(run.tracking)
        directory = create_or_open(run_dir, run, name)
    else:
        directory = _wait_for_rank_0(RunDirectory(run_dir), run)
    if (summary := directory.read_summary()) is not None:
        refuse_complete(directory, from_step)
        if rank == 0:
            print(render_complete(str(directory), summary), flush=True)
        return COMPLETE
    if rank != 0:
        return _work(directory)
    with directory.lock():
        # A restart of torchrun's own goes on from what was saved since.
        if from_step is not None and os.environ.get(_RESTARTS, "0") == "0":
            store = open_store(run.checkpoint.where, directory.path)
            store.claim()
            set_aside_newer(directory, run, store, from_step)
        attempt = launched(directory.events, ranks=world)
        with attempt_in_environment(attempt):
            code = _work(directory)
        ended(directory.events, attempt, code)
        return code


def _work(directory: RunDirectory) -> int:
    os.chdir(directory.working_directory())
    # The worker imports torch and megatron; whoever only launches does without them.
    from .worker import main

    return main(directory.path)


def _check_world(run: RunSettings, world: int) -> None:
    if run.ranks is not None and run.ranks != world:
        raise RunError(
            f"torchrun started {world} ranks and the recipe says ranks: {run.ranks}",
            f"start {run.ranks} ranks (--nproc-per-node x --nnodes), or leave ranks out",
        )
    for index, stage in enumerate(run.stages):
        if world % model_ranks(stage):
            raise RunError(
                f"torchrun started {world} ranks and stages.{index} ({stage.name}) needs "
                f"a multiple of {model_ranks(stage)} (tensor x pipeline x context)",
                "start a multiple of that, or change the stage's parallel degrees",
            )


def _wait_for_rank_0(directory: RunDirectory, run: RunSettings) -> RunDirectory:
    deadline = time.monotonic() + _WAIT_S
    while not directory.is_run():
        if time.monotonic() > deadline:
            raise RunError(
                f"rank 0 did not create {directory} within {_WAIT_S:.0f} s",
                "put the run directory on a disk that all nodes share",
            )
        time.sleep(_POLL_S)
    check_same_recipe(directory, run)
    return directory
