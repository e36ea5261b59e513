"""Train or resume a run on this machine: find its folder, start its ranks, say how it ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, RunError
from .checkpoint.choice import newest_step, refuse_complete, set_aside_newer
from .checkpoint.store import Store, open_store
from .devices import gpu_count
from .exactness import Level, allow
from .failure import COMPLETE, CRASHED, USER_ERROR, Failure, clear_failures, shown
from .gang import Gang, say
from .observe.attempts import ended, launched
from .observe.summary import render_complete
from .observe.wandb_account import check_tracking
from .plan import model_ranks, run_ranks
from .run_directory import RunDirectory, create_or_open
from .settings import RunSettings
from .torchrun import join_torchrun, under_torchrun

# -P: a file of the user's folder must not stand in for a package of the same name.
WORKER = (sys.executable, "-P", "-m", "longspan.trainer.worker")
"""The command of one rank; the run directory is its argument."""


def train(
    run: RunSettings,
    name: str,
    run_dir: Path,
    command: Sequence[str] = WORKER,
    *,
    exactness: Level | None = None,
    from_step: int | None = None,
) -> int:
    """Train a recipe in `run_dir`, or go on with the run of the same recipe that is there.

    Args:
        run: The resolved settings; already checked.
        name: The recipe's name.
        run_dir: Made when it does not exist.
        command: The command of one rank, without its argument.
        exactness: The level that this resume may fall to; None: as the run says.
        from_step: Of the checkpoint to go on from; None: the newest.

    Returns:
        0 complete, 75 stopped and resumable, 2 user error, 1 crash, 130 stopped at once.

    Raises:
        RunError: Nothing could be started.
    """
    allow(exactness)
    if under_torchrun():
        return join_torchrun(run, name, run_dir, from_step)
    local_ranks(run)
    check_tracking(run.tracking)
    directory = create_or_open(run_dir, run, name)
    return _go_on(directory, run, command, from_step)


def resume(
    run_dir: Path,
    command: Sequence[str] = WORKER,
    *,
    exactness: Level | None = None,
    from_step: int | None = None,
) -> int:
    """Go on with the run in `run_dir` from its newest checkpoint.

    Args:
        run_dir: The folder of a run.
        command: The command of one rank, without its argument.
        exactness: The level that this resume may fall to; None: as the run says.
        from_step: Of the checkpoint to go on from, newer ones are set aside; None: the newest.

    Returns:
        As `train`.

    Raises:
        RunError: There is no run, or nothing could be started.
    """
    directory = RunDirectory(run_dir)
    run = directory.load_settings()
    name = directory.read_environment().get("recipe", directory.path.name)
    return train(run, name, directory.path, command, exactness=exactness, from_step=from_step)


def local_ranks(run: RunSettings) -> int:
    """The processes to start on this machine; a CPU takes any number of them.

    Raises:
        RunError: There are fewer GPUs than ranks.
    """
    gpus = gpu_count()
    ranks = run_ranks(run, gpus)
    if 0 < gpus < ranks:
        raise RunError(
            f"the recipe wants {ranks} ranks and this machine has {gpus} GPUs",
            f"set ranks: {gpus} and lower the stages' parallel degrees "
            f"(each needs {math.lcm(*map(model_ranks, run.stages))} ranks or a multiple), "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    return ranks


def _go_on(
    directory: RunDirectory, run: RunSettings, command: Sequence[str], from_step: int | None
) -> int:
    if (summary := directory.read_summary()) is not None:
        refuse_complete(directory, from_step)
        print(render_complete(str(directory), summary), flush=True)
        return COMPLETE
    with directory.lock() as lock:
        store = open_store(run.checkpoint.where, directory.path)
        store.claim()
        if from_step is not None:
            set_aside_newer(directory, run, store, from_step)
        step = newest_step(store)
        if step is not None:
            print(f"{directory}: going on from the checkpoint at step {step}", flush=True)
        elif directory.events.exists():
            print(f"{directory}: no checkpoint yet, starting from the beginning", flush=True)
        for retry in (False, True):
            clear_failures(directory.path)
            ranks = local_ranks(run)
            attempt = launched(directory.events, ranks=ranks)
            gang = Gang(directory, ranks, command, attempt, run.recovery.grace, (lock,))
            code = gang.run()
            failure = gang.failure()
            ended(directory.events, attempt, code, failure)
            if code != CRASHED or retry or not _is_port_clash(failure):
                break
        _report(directory, store, code, failure)
    return code


def _is_port_clash(failure: Failure | None) -> bool:
    """Whether another process took the port between our choice and rank 0's listening."""
    text = "" if failure is None else f"{failure.message}\n{failure.traceback}".lower()
    return "eaddrinuse" in text or "address already in use" in text


def _report(directory: RunDirectory, store: Store, code: int, failure: Failure | None) -> None:
    """Say on stderr why the ranks ended, once, and how to go on."""
    if code == COMPLETE:
        return
    if code in (CRASHED, USER_ERROR) and failure is not None:
        say(shown(failure))
        if failure.kind == "internal" and failure.traceback:
            say(f"  logs: {directory}/logs")
    try:
        step = newest_step(store)
    except CheckpointError:  # why the ranks ended decides the exit code, not this
        say(f"go on with:\n  longspan resume {directory}")
        return
    if step is None:
        say("no checkpoint was written; start again with:")
    else:
        say(f"the newest checkpoint is at step {step}; go on with:")
    say(f"  longspan resume {directory}")
