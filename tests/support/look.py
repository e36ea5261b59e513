"""Look: a driver that does nothing but preflight, as a process of its own.

Arguments: the run's folder, and the process of a raylet to stop before nodes are looked at.
"""

import os
import signal
import sys
from pathlib import Path

import ray
from longspan.cluster.nodes import alive_nodes
from longspan.cluster.preflight.preflight import preflight
from longspan.trainer.observe.events import EventLog

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.short_run import short_run


def main(run_dir: Path, raylet: int) -> None:
    """Look at all nodes that have cores."""
    ray.init(log_to_driver=False)
    nodes = [node for node in alive_nodes() if node.cores]
    os.kill(raylet, signal.SIGSTOP)
    log = EventLog(run_dir / "events.jsonl")
    preflight(nodes, short_run(), run_dir, log=log)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
