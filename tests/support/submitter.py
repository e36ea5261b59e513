"""Submitter: a user beside a real cluster with a dashboard, and the command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from longspan.cluster.clusters import Cluster
from longspan.cluster.jobs import Jobs
from longspan.cluster.settings import ClusterSettings
from longspan.errors import ClusterError
from support.cluster import HOME, LocalCluster, workers

KEYS = {name: f"planted-{name}-0123456789" for name in ("environment", "path", "netrc", "login")}
# A rank that shows what it was given, as a careless library does.
_TOLD = """
import os, sys
if "longspan.trainer.worker" in sys.orig_argv:
    print("login:", os.environ.get("MY_LOGIN"), file=sys.stderr, flush=True)
"""
LISTS = ("actors", "jobs", "nodes", "objects", "placement_groups", "runtime_envs", "tasks",
          "workers")  # fmt: skip
_PATHS = (
    "/api/jobs/", "/nodes?view=summary", "/logical/actors", "/events", "/api/v0/tasks/timeline",
    "/api/v0/tasks/summarize", "/api/v0/actors/summarize", "/api/cluster_status",
    "/api/component_activities", "/api/v0/cluster_metadata",
    *(f"/api/v0/{name}?detail=true&limit=10000" for name in LISTS),
)  # fmt: skip
_OF_NODE = ("/nodes/{}", "/api/v0/logs?node_id={}")


class Submitter:
    """A user beside a cluster with a dashboard; keys of theirs lie around."""

    def __init__(self, folder: Path) -> None:
        self._before = dict(os.environ)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # Only Ray's own processes begin here; the keys are in none of their environments.
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(_TOLD)
        path = {"PYTHONPATH": os.pathsep.join([str(folder / "site"), str(HOME)])}
        self.cluster = LocalCluster(dashboard=True, variables=path)
        self.run_dir = folder / "shared" / "runs" / "mine"
        home = folder / "home"
        home.mkdir()
        (folder / "shared").mkdir()
        (home / ".netrc").write_text(
            f"machine api.wandb.ai\n  login user\n  password {KEYS['netrc']}\n"
        )
        (home / ".netrc").chmod(0o600)
        (folder / "token").write_text(self.cluster.token)
        (folder / "key").write_text(KEYS["path"] + "\n")
        (folder / "login").write_text(KEYS["login"] + "\n")
        address = f"http://127.0.0.1:{self.cluster.dashboard_port}"
        lab = {
            "address": address,
            "storage": str(folder / "shared"),
            "token": str(folder / "token"),
            "secrets": {"PLANTED_API_KEY": str(folder / "key"), "MY_LOGIN": str(folder / "login")},
        }
        (folder / "clusters.yaml").write_text(yaml.safe_dump({"clusters": {"lab": lab}}))
        self._environment = {
            **os.environ,
            "HOME": str(home),
            "LONGSPAN_HOME": str(folder / "records"),
            "LONGSPAN_CLUSTERS": str(folder / "clusters.yaml"),
            "WANDB_API_KEY": KEYS["environment"],
        }
        self.jobs = Jobs(Cluster("lab", ClusterSettings.model_validate(lab)))

    def longspan(self, *words: str) -> str:
        """What a command that succeeds says."""
        done = subprocess.run(
            [sys.executable, "-m", "longspan.cli", *words],
            env=self._environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait_for(self, what, seconds: float = 300.0):
        """Wait until `what()` is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            late = time.monotonic() > deadline
            assert not late, [self.jobs.logs(job.id) for job in self.jobs.all()]
            time.sleep(0.2)
        return found

    def wait_for_dashboard(self) -> None:
        """Its parts start one after the other."""

        def answers():
            try:
                return self.jobs.all() is not None
            except ClusterError:
                return False

        self.wait_for(answers, 120)

    def status(self) -> str:
        """Of the newest job."""
        return self.jobs.of_run("mine")[-1].status

    def answers(self) -> dict[str, str]:
        """What the dashboard shows, by path: lists with all details, and all of each node."""
        nodes = json.loads(self._answer("/api/v0/nodes"))["data"]["result"]["result"]
        alive = [node["node_id"] for node in nodes if node["state"] == "ALIVE"]
        paths = [*_PATHS, *(path.format(node) for node in alive for path in _OF_NODE)]
        return {path: self._answer(path) for path in paths}

    def _answer(self, path: str) -> str:
        answer = self.jobs.door.ask("GET", path)
        assert answer.status == 200, f"{path}: {answer.status} {answer.body[:500]!r}"
        return answer.body.decode()

    def ranks(self) -> dict[int, int]:
        """Their processes, once they are there; a job that has failed has none."""
        assert self.status() != "FAILED", self.jobs.logs("mine-1")
        return workers(self.run_dir)

    def close(self) -> None:
        """End the cluster."""
        self.cluster.close()
        os.environ.clear()
        os.environ.update(self._before)
