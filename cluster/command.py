"""Command: how the driver of a run is called as a Ray job, whoever starts that."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

ENDING_S = 60
"""Seconds beyond `recovery.grace` in which a run that was asked to stop may end by itself."""


def driver_command(
    module: str,
    run_id: str,
    run_dir: str,
    name: str,
    options: Sequence[str] = (),
    *,
    recipe: str = "",
    device: str = "",
    ranks: int = 0,
    slots: int = 0,
    secrets: Mapping[str, str],
    interface: str | None,
) -> str:
    """A command line for a shell; see `cluster.driver.Options`.

    Args:
        module: Of longspan, that is or becomes the driver.
        run_id: Of the run.
        run_dir: Its folder.
        name: Of the recipe.
        options: More of the driver's options.
        recipe: The file of the resolved one; empty: the module knows.
        device: What every rank is to have; empty: not decided, and neither are ranks.
        ranks: Processes of the run.
        slots: Ranks that the largest node takes; 0: not known.
        secrets: Files on the nodes, by the name of the variable that gets their content.
        interface: Of the network between the nodes; None: any.
    """
    words = ["--run-id", run_id, "--run-dir", run_dir, "--name", name]
    words += ["--recipe", recipe] if recipe else []
    # What was decided here holds there: other nodes may be up by then, or none yet.
    if device:
        words += ["--device", device, "--ranks", str(ranks)]
    if slots:
        words += ["--slots", str(slots)]
    words += options
    if secrets:
        words += ["--secrets", *(f"{name}={path}" for name, path in secrets.items())]
    if interface is not None:
        words += ["--interface", interface]
    # exec: the shell would get the signal to stop as well, and die of it.
    return f"exec python -P -m longspan.cluster.{module} {shlex.join(words)}"


def job_variables(grace_s: float) -> dict[str, str]:
    """The environment of the job.

    Args:
        grace_s: Seconds to save in when the run is asked to stop.
    """
    # Ray kills a driver 3 seconds after it was asked to stop, unless told otherwise.
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(round(grace_s) + ENDING_S)}
