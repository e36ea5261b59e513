"""Faults that a run on a cluster meets: each strikes, and tells what the driver is to say of it."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.cluster import Drive, LocalCluster, kill, parent, raylet


@dataclass
class Scene:
    """A run at work.

    Attributes:
        cluster: Where.
        drive: Its driver.
        attempt: The one that a fault meets.
    """

    cluster: LocalCluster
    drive: Drive
    attempt: int

    def node_of(self, rank: int):
        """The node that a rank is on."""
        worker = parent(self.drive.workers()[rank])
        owner = parent(worker)
        (found,) = [n for n in self.cluster.nodes if raylet(n).pid == owner]
        return found


def kill_rank(scene: Scene) -> tuple[str, str]:
    """The process of a rank dies."""
    kill(scene.drive.workers()[1])
    return "infrastructure", "rank 1 was killed by SIGKILL"


def kill_rank_beside_another(scene: Scene) -> tuple[str, str]:
    """The process of a rank dies, and the other one stays in what it is at, as with NCCL."""
    ranks = scene.drive.workers()
    kill(ranks[0], signal.SIGSTOP)
    kill(ranks[1])
    return "infrastructure", "rank 1 was killed by SIGKILL"


def kill_worker(scene: Scene) -> tuple[str, str]:
    """The Ray worker that minds a rank dies."""
    kill(parent(scene.drive.workers()[1]))
    return "infrastructure", "rank 1"


def kill_node(scene: Scene) -> tuple[str, str]:
    """The node of a rank dies."""
    node = scene.node_of(1)
    scene.cluster.kill_node(node)
    return "infrastructure", f"lost node {node.node_id[:8]}"


def hang(scene: Scene) -> tuple[str, str]:
    """The process of a rank is stopped."""
    kill(scene.drive.workers()[1], signal.SIGSTOP)
    return "infrastructure", "rank 1 is in section step"


def notice(scene: Scene) -> tuple[str, str]:
    """The Ray worker of a rank is asked to end."""
    kill(parent(scene.drive.workers()[1]), signal.SIGTERM)
    return "preemption", "a worker was asked to end"


def drain(scene: Scene) -> tuple[str, str]:
    """The node of a rank is about to be taken back."""
    node = scene.node_of(1)
    words = ["drain-node", "--address", scene.cluster.address, "--node-id", node.node_id]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
    words += ["--deadline-remaining-seconds", "120"]
    ray = Path(sys.executable).with_name("ray")
    scene.cluster.spoiled.append(node)
    done = subprocess.run([ray, *words], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return "preemption", f"node {node.node_id[:8]} is taken away"
