"""How long `longspan status` and `longspan runs` take with a hundred runs recorded.

A third of the runs are on a cluster that takes connections and never answers, a third on one that
refuses them, the rest are here; all have a folder that is visible. Each command is a whole process,
after one that is not timed and leaves the bytecode of what it imports.
Run: python benchmarks/status.py --out benchmarks/results/status-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import longspan
from about import about

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from longspan.cluster.registry import Place, Record, Registry, Submission
from support.recorded import leave_run

_TARGET_S = 2.0
_STEPS = 500
"""Of each run: its events are longer than what a list reads of them."""


def main() -> int:
    """Times the commands, and writes what came of it with the versions."""
    args = _parse()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        with socket.create_server(("127.0.0.1", 0)) as server:
            refusing = server.getsockname()[1]
        ports = {"silent": silent.getsockname()[1], "refusing": refusing}
        environment = _record(folder, args.runs, ports)
        commands = {
            "longspan status": ["status"],
            "longspan runs": ["runs"],
            "longspan status ID, a run of this machine": ["status", "here-2"],
            "longspan status ID, on the cluster that refuses": ["status", "refusing-1"],
        }
        # Whoever asks for one run waits longer for its cluster than a list does.
        beside = {"longspan status ID, on the cluster that is silent": ["status", "silent-0"]}
        seconds = {
            name: [_time(words, environment) for _ in range(1 + args.times)][1:]
            for name, words in {**commands, **beside}.items()
        }
    result = {
        "runs": args.runs,
        "times": args.times,
        "target_s": _TARGET_S,
        "median_s": {name: round(median(found), 3) for name, found in seconds.items()},
        "most_s": {name: round(max(found), 3) for name, found in seconds.items()},
        "met": all(median(seconds[name]) < _TARGET_S for name in commands),
        "load": round(os.getloadavg()[0], 2),
        **about("pydantic"),
    }
    print(_table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--times", type=int, default=5, help="how often each command is timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.runs < 3 or args.times < 1:
        parser.error("there are 3 runs at least, and each command is timed once at least")
    return args


def _record(folder: Path, runs: int, ports: Mapping[str, int]) -> dict[str, str]:
    """Leaves the runs, and returns the environment that finds them."""
    registry = Registry(folder / "records")
    (folder / "clusters.yaml").write_text(
        json.dumps(
            {
                "clusters": {
                    name: {"address": f"http://127.0.0.1:{port}", "storage": str(folder)}
                    for name, port in ports.items()
                }
            }
        )
    )
    for number in range(runs):
        name = (*ports, "here")[number % 3]
        directory = leave_run(folder / "runs" / f"{name}-{number}", _STEPS)
        record = Record(f"{name}-{number}", "short", time.time(), str(directory.path))
        if name in ports:
            place = Place(name, f"http://127.0.0.1:{ports[name]}", str(folder))
            sent = (Submission(f"{record.id}-1", time.time()),)
            record = Record(record.id, "short", record.created, record.run_dir, place, sent)
        registry.write(record)
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "LONGSPAN_HOME": str(folder / "records"),
        "LONGSPAN_CLUSTERS": str(folder / "clusters.yaml"),
        "PYTHONPATH": str(Path(longspan.__file__).parents[1]),
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    }


def _time(words: Sequence[str], environment: Mapping[str, str]) -> float:
    """Seconds of one command, as a process."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "longspan.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    assert "stopped" in done.stdout, done.stdout
    return seconds


def _table(result: Mapping[str, Any]) -> str:
    """For people."""
    rows = [f"{'command':55} {'median':>8} {'most':>8}"]
    for name, seconds in result["median_s"].items():
        rows.append(f"{name:55} {seconds:6.2f} s {result['most_s'][name]:6.2f} s")
    met = "met" if result["met"] else "not met"
    rows.append(f"{result['runs']} runs; target {result['target_s']} s: {met}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
