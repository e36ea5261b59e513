"""All cases of the grids of which the tests draw some every day.

Run: python benchmarks/grids.py --out benchmarks/results/context-grids-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from about import about

ROOT = Path(__file__).parents[1]
GRIDS = {
    "exchanges": ["tests/parallel"],
    "mechanisms": ["tests/attention/test_context_ranks.py"],
    "training": [
        "tests/trainer/engine/test_context_parallel.py",
        "tests/trainer/engine/test_mechanisms.py",
        "-k",
        "context_parallel or twenty",
    ],
    "layouts": [
        "tests/trainer/engine/test_mechanisms.py",
        "tests/trainer/engine/test_reshard.py",
        "-k",
        "layout or experts or four_ranks",
    ],
    "kills": [
        "tests/trainer/test_attention_stages.py",
        "tests/trainer/test_run.py",
        "-k",
        "killed",
    ],
    "memory": [
        "tests/attention/test_ssa.py",
        "tests/kernels/test_map_loss_memory.py",
        "-k",
        "64k",
    ],
}


def run(name: str) -> dict[str, Any]:
    """Runs one grid, and counts its tests; each of them runs many cases."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *GRIDS[name]]
    begun = time.monotonic()
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"LONGSPAN_TEST_GRID": "full"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(ended.stdout[-2000:], flush=True)
    counted = re.findall(r"(\d+) (passed|failed|skipped|errors?)", ended.stdout.splitlines()[-1])
    return {
        "grid": name,
        "tests": " ".join(GRIDS[name]),
        **{kind: int(count) for count, kind in counted},
        "exit": ended.returncode,
        "seconds": round(time.monotonic() - begun),
    }


def main() -> int:
    """Runs the grids, and writes what came of them with the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [run(name) for name in args.grids]
    result = {
        "rows": rows,
        **about("torch", "megatron-core"),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return max(row["exit"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
