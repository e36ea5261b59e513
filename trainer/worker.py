"""One rank of a run: `python -m longspan.trainer.worker RUN_DIR`, started by the launcher."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from .failure import COMPLETE, STOPPED, die_with_parent, record_failure
from .heartbeat import Heartbeat, open_heartbeat
from .stopping import StopRequest

# The first step of another rank may wait for this one to tokenise the corpus.
_TIMEOUT_S = 7200.0


def main(run_dir: Path) -> int:
    """Work as the rank that the environment names.

    Returns:
        The exit code: 0 complete, 75 stopped and resumable, else a failure, which is recorded.
    """
    stop = StopRequest()
    stop.listen()
    beat = open_heartbeat()
    rank = int(os.environ["RANK"])
    try:
        return COMPLETE if _run(run_dir, rank, stop, beat) else STOPPED
    except Exception as error:
        return record_failure(run_dir, rank, error)


def _run(run_dir: Path, rank: int, stop: StopRequest, beat: Heartbeat) -> bool:
    """Join the other ranks and run; whether the run is complete."""
    from .observe.wandb_account import check_set_up
    from .run_directory import RunDirectory

    directory = RunDirectory(run_dir)
    run = directory.load_settings()
    if rank == 0:  # whoever started it may be on another machine
        check_set_up(run.tracking)
    # Here, because torch and megatron take seconds, in which the launcher may die or the user stop.
    import torch.distributed as dist

    from .loop import Run
    from .observe.observer import open_observer
    from .platform import backend, barrier, set_up
    from .rendezvous import meet

    set_up(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    meet(backend(), timedelta(seconds=max(_TIMEOUT_S, run.recovery.hang.data)))
    observer = open_observer(directory, run, rank)
    try:
        complete = Run(directory, run, observer, stop, beat).train()
    finally:
        beat.enter("end")
        observer.close()
    barrier()
    dist.destroy_process_group()
    return complete


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(Path(sys.argv[1])))
