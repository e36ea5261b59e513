"""Runs on a real cluster of two nodes end as `longspan train` ends them, whatever happens."""

import json
import os
import subprocess
import sys

import pytest
from support.cluster import Drive
from support.kills import tiny_settings
from support.unkilled import Reference

EVERY = 4
STEPS = 24
_LOCAL = """
import json, sys
from pathlib import Path
from longspan.trainer.launch import train
from longspan.trainer.settings import RunSettings
sys.exit(train(RunSettings.model_validate(json.loads(sys.argv[1])), "tiny", Path(sys.argv[2])))
"""


def settings(texts, **changes):
    """One stage on two data ranks."""
    raw = tiny_settings(texts, 2 * STEPS, EVERY)
    return {**raw, "stages": raw["stages"][:1], **changes}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def reference(started_cluster, texts, tmp_path_factory):
    """The run by `longspan train`, which kept all of its checkpoints."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    kept = settings(texts, checkpoint={"every": EVERY, "keep": STEPS})
    done = subprocess.run(
        [sys.executable, "-c", _LOCAL, json.dumps(kept), str(run_dir)],
        env=dict(os.environ), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Reference(run_dir)


def test_a_run_on_two_nodes_ends_bit_equal(cluster, reference, texts, tmp_path):
    drive = Drive(cluster, settings(texts), tmp_path / "run")
    assert drive.ends() == 0, drive.text()
    reference.assert_same_content(drive.run_dir)
    assert reference.assert_history(drive.run_dir, EVERY) == 0
    said = drive.said()
    assert "attempt 1 with 2 ranks on 2 nodes, from the beginning" in said
    assert "run complete" in said and "goodput" in said
    assert "raylet" not in said and "pid=" not in said
