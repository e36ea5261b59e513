"""Whole runs whose later stages have another attention, killed in the middle and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from longspan.trainer.observe.events import read_events
from support.grid import sample

NSA = "{kind: nsa, block: 8, count: 4, window: 16, compress_length: 8, compress_stride: 4}"
INDEXER = "kind: indexer, count: 24, heads: 2, dim: 16"
RECIPES = {
    "nsa": f"""
base: smoke
ranks: 1
checkpoint: {{every: 3}}
telemetry: {{every: 2}}
evaluation: {{sequences: 2, visible: 64, documents: 2}}
stages:
  - {{name: base, length: 128, tokens: 4K, micro_batch: 2, optimizer: {{lr: 3e-3}}}}
  - name: sparse
    length: 256
    tokens: 8K
    attention: {{mechanism: {NSA}, output_gate: head}}
""",
    "indexer": f"""
base: smoke
ranks: 2
checkpoint: {{every: 3}}
telemetry: {{every: 2}}
evaluation: {{sequences: 2, visible: 64, documents: 2}}
stages:
  - {{name: base, length: 128, tokens: 4K, micro_batch: 2, optimizer: {{lr: 3e-3}}}}
  - name: warm_up
    length: 256
    tokens: 4K
    trainable: selection
    attention: {{mechanism: {{{INDEXER}, attend: dense}}}}
    parallel: {{tensor: 2}}
  - name: sparse
    length: 256
    tokens: 4K
    attention: {{mechanism: {{{INDEXER}}}}}
""",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "LONGSPAN_CACHE": cache, "WANDB_MODE": "disabled"}


def command(*words):
    return [sys.executable, "-m", "longspan.cli", *words]


def steps(run_dir):
    """Everything but times, by step; of a step computed twice, the last."""
    events = read_events(run_dir / "events.jsonl")
    return {
        e["step"]: (e["loss"], e["grad_norm"], e["losses"]) for e in events if e["event"] == "step"
    }


@pytest.mark.parametrize("name", sample("killed stages", RECIPES, 1))
def test_killed_in_a_stage_with_new_parameters_and_resumed(environment, tmp_path, name):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPES[name])
    how = {"cwd": tmp_path, "env": environment, "text": True}
    train = command("train", "mine.yaml", "--run-dir")
    straight = subprocess.run([*train, "straight"], capture_output=True, timeout=240, **how)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    assert "parameter tensors to those of step-00000004" in straight.stdout
    want = steps(tmp_path / "straight")
    assert sorted(want) == list(range(1, 13))
    events = read_events(tmp_path / "straight" / "events.jsonl")
    looks = [e for e in events if e["event"] == "attention"]
    assert len(looks) == 6 and {"recall", "kept"} <= set(looks[-1]["layers"][0])
    process = subprocess.Popen(
        [*train, "killed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how
    )
    deadline = time.monotonic() + 120
    while 8 not in steps(tmp_path / "killed"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = subprocess.run(command("resume", "killed"), capture_output=True, timeout=240, **how)
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps(tmp_path / "killed") == want
    complete = json.loads((tmp_path / "killed" / "complete.json").read_text())
    assert complete["steps"] == 12
