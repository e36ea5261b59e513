"""The benchmark of the control plane, small: it drives parts of a run that no user calls."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "control_plane.py"


def test_every_rank_joins_reports_and_ends(tmp_path):
    out = tmp_path / "out.json"
    words = ["--small", "--seconds", "1", "--interval", "0.5", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *words, "--out", out], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert (case["ranks"], case["nodes"]) == (8, 4)
    assert case["calls_of_nodes_per_min"] > 0 and case["calls_of_driver_per_min"] > 0
