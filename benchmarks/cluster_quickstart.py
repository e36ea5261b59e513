"""The quickstart submitted to a cluster of two nodes, beside `longspan train quickstart`.

The cluster is a head and two nodes of a core each on this machine, so the run's two ranks, which
share every sequence of the second stage, are on different nodes. Both runs must end bit-equal:
weights, moments, the loss of every step, and the proof of context.
Run: python benchmarks/cluster_quickstart.py --out benchmarks/results/cluster-quickstart-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from about import about

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.submitter import Submitter
from support.unkilled import committed, content, steps_of

_LIMIT_S = 3600.0
_KEPT = ("tokens", "parameters", "evaluations")


def main() -> int:
    """Trains the recipe twice, compares, and writes what came of it with the versions."""
    args = _parse()
    changes = [word for change in args.changes for word in ("--set", change)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here = folder / "here"
        submitter = Submitter(folder)
        stack.callback(submitter.close)
        submitter.wait_for_dashboard()
        submitter.longspan("train", "quickstart", *changes, "--run-dir", str(here))
        submitter.longspan("submit", "quickstart", *changes, "--run-id", "mine")
        submitter.wait_for(lambda: submitter.status() not in ("PENDING", "RUNNING"), _LIMIT_S)
        said = submitter.longspan("logs", "mine")
        assert submitter.status() == "SUCCEEDED", said
        print(said)
        found = _compared(here, submitter.run_dir)
    result = {
        "outcome": "bit-equal",
        **found,
        "changes": args.changes,
        **about("ray", "torch", "megatron-core"),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _compared(here: Path, there: Path) -> dict[str, Any]:
    """What both runs have in common.

    Raises:
        AssertionError: They differ.
    """
    assert len({*_nodes(there)}) == 2, "both ranks were on one node"
    left, right = (committed(run_dir)[-1] for run_dir in (here, there))
    assert left.name == right.name, (left, right)
    wanted, got = content(left), content(right)
    assert wanted.keys() == got.keys()
    different = [name for name in wanted if not torch.equal(wanted[name], got[name])]
    assert not different, f"{left.name} differs in {different}"
    steps = steps_of(here)
    assert steps == steps_of(there), "steps differ"
    proofs = [_proof(run_dir) for run_dir in (here, there)]
    assert proofs[0] == proofs[1], proofs
    return {
        "checkpoint": left.name,
        "tensors": len(wanted),
        "steps": len(steps),
        "final_loss": steps[-1]["loss"],
        **proofs[0],
    }


def _nodes(run_dir: Path) -> list[str]:
    lines = (run_dir / "events.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    (launched,) = [event for event in events if event["event"] == "launched"]
    return launched["nodes"]


def _proof(run_dir: Path) -> dict[str, Any]:
    """The results of a run's end that no clock decides."""
    summary = json.loads((run_dir / "complete.json").read_text("utf-8"))
    return {key: summary[key] for key in _KEPT}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="PATH=VALUE",
                        help="change the recipe for both runs")  # fmt: skip
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
