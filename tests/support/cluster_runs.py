"""A tiny run for clusters, and what `longspan train` makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.kills import tiny_settings
from support.unkilled import Reference

EVERY = 4
STEPS = 160
_LOCAL = """
import json, sys
from pathlib import Path
from longspan.trainer.launch import train
from longspan.trainer.settings import RunSettings
sys.exit(train(RunSettings.model_validate(json.loads(sys.argv[1])), "tiny", Path(sys.argv[2])))
"""


def cluster_run(texts: Path, **changes: Any) -> dict[str, Any]:
    """Settings of two stages: on two data ranks, then on two context ranks."""
    return {**tiny_settings(texts, STEPS, EVERY), **changes}


def local_reference(texts: Path, run_dir: Path, **changes: Any) -> Reference:
    """The run by `longspan train`, which kept all of its checkpoints."""
    kept = cluster_run(texts, checkpoint={"every": EVERY, "keep": STEPS}, **changes)
    return trained_here(kept, run_dir)


def trained_here(settings: dict[str, Any], run_dir: Path) -> Reference:
    """A run by `longspan train`, with the checkpoints that it kept."""
    done = subprocess.run(
        [sys.executable, "-c", _LOCAL, json.dumps(settings), str(run_dir)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Reference(run_dir)
