"""Submitter: a user beside a real cluster with a dashboard, and the command line."""

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
from support.cluster import LocalCluster, workers

KEYS = {name: f"planted-{name}-0123456789" for name in ("environment", "path", "netrc")}


class Submitter:
    """A user beside a cluster with a dashboard; keys of theirs lie around."""

    def __init__(self, folder: Path) -> None:
        self._before = dict(os.environ)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # Only Ray's own processes begin here; the keys are in none of their environments.
        self.cluster = LocalCluster(dashboard=True)
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
        address = f"http://127.0.0.1:{self.cluster.dashboard_port}"
        lab = {
            "address": address,
            "storage": str(folder / "shared"),
            "token": str(folder / "token"),
            "secrets": {"PLANTED_API_KEY": str(folder / "key")},
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

    def ranks(self) -> dict[int, int]:
        """Their processes, once they are there; a job that has failed has none."""
        assert self.status() != "FAILED", self.jobs.logs("mine-1")
        return workers(self.run_dir)

    def close(self) -> None:
        """End the cluster."""
        self.cluster.close()
        os.environ.clear()
        os.environ.update(self._before)
