"""A submitted run on a real cluster ends bit-equal and shows no credential, whatever it meets.

What it meets is drawn by day.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from longspan.cluster.clusters import Cluster
from longspan.cluster.jobs import Jobs
from longspan.cluster.settings import ClusterSettings
from longspan.errors import ClusterError
from support.cluster import LocalCluster, workers
from support.cluster_runs import EVERY, cluster_run
from support.grid import sample
from support.unkilled import newest_step

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


@pytest.fixture
def submitter(tmp_path):
    """One for a test."""
    found = Submitter(tmp_path)
    found.wait_for_dashboard()
    yield found
    found.close()


def nothing(submitter):
    return 1


def the_head_is_killed(submitter):
    submitter.wait_for(lambda: newest_step(submitter.run_dir) >= EVERY)
    submitter.cluster.restart_head()
    submitter.wait_for_dashboard()
    assert not submitter.jobs.all()
    assert newest_step(submitter.run_dir) > 0
    assert "submitted mine-2" in submitter.longspan("resume", "mine")
    return 2


MEETS = (nothing, the_head_is_killed)


@pytest.mark.parametrize("meets", sample("submitted", MEETS, 1), ids=lambda meets: meets.__name__)
def test_a_submitted_run_ends_bit_equal_and_shows_no_key(
    submitter, reference, texts, tmp_path, meets
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(cluster_run(texts)))
    said = submitter.longspan("submit", str(recipe), "--run-id", "mine")
    ranks = submitter.wait_for(submitter.ranks)
    environment = Path(f"/proc/{min(ranks.values())}/environ").read_bytes()
    assert f"PLANTED_API_KEY={KEYS['path']}".encode() in environment
    jobs = meets(submitter)
    submitter.wait_for(lambda: submitter.status() not in ("PENDING", "RUNNING"))
    said += submitter.longspan("status", "mine") + submitter.longspan("logs", "mine")
    assert submitter.status() == "SUCCEEDED", said
    reference.assert_same_content(submitter.run_dir)
    reference.assert_history(submitter.run_dir, EVERY)

    (job,) = submitter.jobs.of_run("mine")
    assert job.id == f"mine-{jobs}"
    answers = [said, submitter.jobs.logs(job.id), json.dumps(dict(job.metadata))]
    for path in ("/api/jobs/", "/nodes?view=summary"):
        answer = submitter.jobs.door.ask("GET", path)
        assert answer.status == 200
        answers.append(answer.body.decode())
    assert "mine" in answers[3] and "raylet" in answers[4]
    assert_no_key({f"answer {number}": text.encode() for number, text in enumerate(answers)})
    assert_no_key(contents(submitter.run_dir, 10))
    # Also what Ray wrote of its own accord: logs of drivers and workers, events, sessions.
    assert_no_key(contents(submitter.cluster.folder, 50))
    assert_no_key(contents(tmp_path / "records", 1))


def contents(folder: Path, least: int) -> dict[str, bytes]:
    """Of all files below a folder."""
    found = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(found) >= least
    return found


def assert_no_key(texts: dict[str, bytes]) -> None:
    shown = [(name, key) for name, text in texts.items() for key in KEYS.values()
             if key.encode() in text]  # fmt: skip
    assert not shown
