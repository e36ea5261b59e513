"""A submitted run on a real cluster ends bit-equal and shows no credential, whatever it meets.

What it meets is drawn by day.
"""

from pathlib import Path

import pytest
import yaml
from support.cluster_runs import EVERY, cluster_run
from support.grid import sample
from support.submitter import KEYS, LISTS, Submitter
from support.unkilled import newest_step


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
    recipe.write_text(yaml.safe_dump(cluster_run(texts, tracking={"wandb": "offline"})))
    said = submitter.longspan("submit", str(recipe), "--run-id", "mine")
    ranks = submitter.wait_for(submitter.ranks)
    environment = Path(f"/proc/{min(ranks.values())}/environ").read_bytes()
    assert f"PLANTED_API_KEY={KEYS['path']}".encode() in environment
    assert f"MY_LOGIN={KEYS['login']}".encode() in environment
    jobs = meets(submitter)
    submitter.wait_for(lambda: submitter.status() not in ("PENDING", "RUNNING"))
    said += submitter.longspan("status", "mine") + submitter.longspan("logs", "mine")
    assert submitter.status() == "SUCCEEDED", said
    reference.assert_same_content(submitter.run_dir)
    reference.assert_history(submitter.run_dir, EVERY)

    (job,) = submitter.jobs.of_run("mine")
    assert job.id == f"mine-{jobs}"
    answers = submitter.answers()
    assert_something_is_shown(answers)
    answers |= {"said": said, "log": submitter.jobs.logs(job.id)}
    assert_no_key({path: text.encode() for path, text in answers.items()})
    # What the ranks print, and what Weights & Biases keeps to upload later.
    assert "login: ***" in (submitter.run_dir / "logs" / "rank-1.log").read_text()
    assert list(submitter.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert_no_key(contents(submitter.run_dir, 10))
    # Also what Ray wrote of its own accord: logs of drivers and workers, events, sessions.
    assert_no_key(contents(submitter.cluster.folder, 50))
    assert_no_key(contents(tmp_path / "records", 1))


def assert_something_is_shown(answers: dict[str, str]) -> None:
    """The dashboard's answers are of this run, and whole."""
    of = {name: answers[f"/api/v0/{name}?detail=true&limit=10000"] for name in LISTS}
    assert '"longspan_run": "mine"' in answers["/api/jobs/"]
    assert "raylet" in answers["/nodes?view=summary"] and "worker_id" in of["workers"]
    assert "Watch" in of["actors"] and "Watch.report" in of["tasks"]
    assert "LONGSPAN_RECIPE" in of["runtime_envs"]
    logs = [text for path, text in answers.items() if path.startswith("/api/v0/logs")]
    assert len(logs) == 3 and "raylet" in logs[0]


def contents(folder: Path, least: int) -> dict[str, bytes]:
    """Of all files below a folder."""
    found = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(found) >= least
    return found


def assert_no_key(texts: dict[str, bytes]) -> None:
    shown = [(name, key) for name, text in texts.items() for key in KEYS.values()
             if key.encode() in text]  # fmt: skip
    assert not shown
