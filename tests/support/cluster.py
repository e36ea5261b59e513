"""A real Ray cluster on this machine: a head and worker nodes of their own, with token auth."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import longspan
import yaml
from longspan.trainer.observe.events import read_events

STORE_BYTES = 80 * 2**20
HOME = Path(longspan.__file__).parents[1]
# A node that is gone is known to be after a second or two.
_SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
    "health_check_timeout_ms": 1000,
}


# Ray reads it once in a process: all clusters of one have the same.
_TOKEN = secrets.token_hex(32)


def ray_environment(token: str) -> dict[str, str]:
    """What Ray and the package need in every process."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "PYTHONPATH": str(HOME),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "disabled",
    }


class LocalCluster:
    """A head without cores, and nodes with some; everything on loopback.

    Args:
        cores: Of each node.
        nodes: How many there are at first.
        dashboard: Whether the head serves one (the Jobs API).
        variables: More of the environment of its nodes.
    """

    def __init__(
        self,
        cores: int = 1,
        nodes: int = 2,
        dashboard: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.token = _TOKEN
        self.folder = Path(tempfile.mkdtemp(prefix="lsc-"))
        self.environment = ray_environment(self.token) | dict(variables or {})
        self.environment["LONGSPAN_CACHE"] = str(self.folder / "cache")
        # Where Ray notes its newest cluster, and where its jobs look for theirs.
        self.environment["RAY_TMPDIR"] = str(self.folder)
        (self.folder / "ray").mkdir()
        os.environ.update(self.environment)
        os.environ.pop("OMP_NUM_THREADS", None)
        from ray.cluster_utils import Cluster

        self.cores = cores
        self.dashboard_port = free_port() if dashboard else None
        head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": dashboard}
        if dashboard:
            head |= {"dashboard_host": "127.0.0.1", "dashboard_port": self.dashboard_port}
        self._head = {**head, "_system_config": _SYSTEM} | self._common
        self._cluster = Cluster(initialize_head=True, head_node_args=self._head)
        self._count = nodes
        self.nodes = [self.add_node() for _ in range(nodes)]
        self.spoiled: list[Any] = []
        """Nodes that no run can use any more although they are alive."""

    @property
    def _common(self) -> dict[str, Any]:
        return {
            "object_store_memory": STORE_BYTES,
            "temp_dir": str(self.folder / "ray"),
            "node_ip_address": "127.0.0.1",
            "dashboard_agent_listen_port": 0,  # all nodes have one address
        }

    @property
    def address(self) -> str:
        """Of the cluster, for RAY_ADDRESS."""
        return str(self._cluster.address)

    def add_node(self) -> Any:
        """One more node."""
        return self._cluster.add_node(num_cpus=self.cores, **self._common)

    def revive(self) -> None:
        """As many nodes as at first, whatever was killed, drained or added."""
        for node in list(self.nodes):
            gone = raylet(node).poll() is not None or node in self.spoiled
            if gone or len(self.nodes) > self._count:
                with contextlib.suppress(Exception):
                    self._cluster.remove_node(node, allow_graceful=False)
                self.nodes.remove(node)
        self.spoiled.clear()
        self.nodes += [self.add_node() for _ in range(self._count - len(self.nodes))]

    def kill_node(self, node: Any) -> None:
        """A node dies: its raylet is killed, and what it had started ends."""
        raylet(node).kill()

    def restart_head(self) -> None:
        """The head dies with all that runs there, and its nodes do; new ones take their places."""
        self._cluster.head_node.kill_all_processes(
            check_alive=False, allow_graceful=False, wait=True
        )
        for node in self.nodes:
            self.kill_node(node)
            self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.head_node = None
        self._cluster.add_node(**self._head)
        self.nodes = [self.add_node() for _ in range(self._count)]

    def close(self) -> None:
        """End everything."""
        self._cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


def raylet(node: Any) -> subprocess.Popen[bytes]:
    """The raylet of a node."""
    return node.all_processes["raylet"][0].process


def free_port() -> int:
    """A port that nobody uses on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Drive:
    """A driver at work.

    Args:
        cluster: Where.
        settings: The run, resolved.
        run_dir: Its folder.
        more: More arguments.
    """

    def __init__(
        self, cluster: LocalCluster, settings: dict[str, Any], run_dir: Path, *more: str
    ) -> None:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        recipe = run_dir.parent / f"{run_dir.name}.yaml"
        recovery = {"wait": 20, **settings.get("recovery", {})}
        recipe.write_text(yaml.safe_dump({**settings, "recovery": recovery}))
        self.run_dir, self.output = run_dir, run_dir.parent / f"{run_dir.name}.out"
        words = ["--run-id", run_dir.name, "--run-dir", str(run_dir), "--name", "tiny"]
        words += ["--recipe", str(recipe), "--interval", "0.5", *more]
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "longspan.cluster.driver", *words],
                env={**os.environ, "RAY_ADDRESS": cluster.address},
                cwd=run_dir.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What happened up to now; of one kind, or all."""
        events = read_events(self.run_dir / "events.jsonl")
        return [event for event in events if name in ("", event["event"])]

    def wait_for(self, what, seconds: float = 300.0) -> Any:
        """Wait until `what()` is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        return found

    def wait_for_step(self, step: int, attempt: int) -> None:
        """Wait until an attempt has made a step."""
        self.wait_for(
            lambda: any(e["step"] >= step and e["attempt"] == attempt for e in self.events("step"))
        )

    def ends(self, seconds: float = 400.0) -> int:
        """The exit code; whatever it leaves behind is ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the driver does not end: {self.text()}") from None

    def text(self) -> str:
        """What it said."""
        logs = [path.read_text("utf-8", "replace")[-1000:] for path in self._logs()]
        return self.output.read_text("utf-8", "replace") + "\n".join(logs)

    def said(self) -> str:
        """What the user heard."""
        return self.output.read_text("utf-8", "replace")

    def _logs(self) -> list[Path]:
        return [p for p in sorted((self.run_dir / "logs").glob("*")) if p.is_file()]

    def workers(self) -> dict[int, int]:
        """The processes of the run's ranks, by rank."""
        return workers(self.run_dir)


def workers(run_dir: Path) -> dict[int, int]:
    """The processes of a run's ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"longspan.trainer.worker" not in words:
                continue
            if str(run_dir).encode() not in words:
                continue
            settings = (folder / "environ").read_bytes().split(b"\0")
            ranks = [v[5:] for v in settings if v.startswith(b"RANK=")]
            found[int(ranks[0])] = int(folder.name)
    return found


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
