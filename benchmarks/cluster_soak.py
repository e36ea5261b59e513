"""One run on a real cluster that meets random faults until they are used up, and then ends.

The cluster is a head and nodes on this machine, each a raylet of its own. Faults are a killed rank,
Ray worker, node (another one is added then) or driver (it is started again), a stopped rank, a
notice, and a full disk where the machine lets one be mounted. A quarter of them come before an
attempt's first step, but for hangs and full disks. The run must end bit-equal to `longspan train`
without faults, with the same loss at every step and none left out. Recovery is from the fault to
the next attempt's first step; a cold start is from a new run's driver to its first step.
Run: python benchmarks/cluster_soak.py --faults 100 --out benchmarks/results/cluster-soak-cpu.json
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from about import about

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.cluster import LocalCluster
from support.cluster_runs import trained_here
from support.cluster_soak import FULL_DISK, KINDS, Disk, Plan, Soak, cold_start
from support.recovered import summary

_TARGET = 1.5


def main() -> int:
    """Runs the soak, and writes what came of it with the versions."""
    args = _parse()
    # What was started and mounted is ended whatever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disk = _disk(folder, stack) if FULL_DISK in args.kinds else None
        kinds = tuple(kind for kind in args.kinds if kind != FULL_DISK or disk is not None)
        plan = Plan(args.faults, kinds, args.every, args.apart, args.seed,
                    args.least, args.first, args.interval, args.preflight)  # fmt: skip
        cluster = LocalCluster(nodes=args.nodes)
        stack.callback(cluster.close)
        reference = trained_here(plan.settings(folder / "texts"), folder / "reference")
        cold = [cold_start(cluster, plan, folder / f"cold-{n}") for n in range(args.starts)]
        print(f"cold starts: {', '.join(f'{seconds:.1f} s' for seconds in cold)}", flush=True)
        soak = Soak(cluster, plan, folder, disk)
        stack.callback(soak.close)
        soak.run(lambda line: print(line, flush=True))
        soak.assert_nothing_lost(reference)
        found = summary(soak.run_dir, soak.struck, cold)
    result = {
        "outcome": "bit-equal",
        "seed": args.seed,
        "faults_wanted": args.faults,
        "nodes": args.nodes,
        "every": args.every,
        "preflight": args.preflight,
        "steps": plan.steps,
        "limits_s": {"least": args.least, "first": args.first, "interval": args.interval},
        "left_out": sorted(set(args.kinds) - set(kinds)),
        **found,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        **about("ray", "torch", "megatron-core"),
    }
    print(_table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--nodes", type=int, default=3, help="the run takes two of them")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--apart", type=int, default=60, help="steps between faults, in the mean")
    parser.add_argument("--starts", type=int, default=3, help="cold starts to compare with")
    parser.add_argument("--least", type=float, default=5.0, help="seconds: recovery.hang.least")
    parser.add_argument("--first", type=float, default=60.0, help="seconds: recovery.hang.first")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds, as of the driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preflight", action="store_true",
                        help="look at nodes first, as a user's runs do")  # fmt: skip
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.nodes < 2 or args.faults < 1 or args.starts < 1:
        parser.error("there are 2 nodes, 1 fault and 1 cold start at least")
    return args


def _disk(folder: Path, stack: ExitStack) -> Disk | None:
    """A disk that can be full; None where it cannot be mounted."""
    try:
        disk = Disk(folder / "disk")
    except (OSError, subprocess.CalledProcessError):
        print("no disk can be mounted here: none is filled", flush=True)
        return None
    stack.callback(disk.close)
    return disk


def _table(result: Mapping[str, Any]) -> str:
    """For people."""
    rows = [f"{'kind':12} {'faults':>6} {'told':>7} {'median':>7} {'90%':>7} {'most':>7} "
            f"{'x cold':>7} {'lost':>5}"]  # fmt: skip
    lost = result["lost_steps"]
    everything = {
        **result,
        "faults": len(result["faults"]),
        "told_s": {},
        "lost_steps": lost["all"],
    }
    for kind, row in {**result["kinds"], "all": everything}.items():
        times = [
            row["told_s"].get("median"),
            *map(row["recovery_s"].get, ("median", "p90", "most")),
        ]
        cells = " ".join(f"{'-' if t is None else f'{t:.1f} s':>7}" for t in times)
        over = row["over_cold_start"] or "-"
        rows.append(f"{kind:12} {row['faults']:6} {cells} {over:>7} {row['lost_steps']:5}")
    cold, over = result["cold_start_s"], result["over_cold_start"]
    share = result["goodput"]["share"]
    met = "met" if over is not None and over <= _TARGET else "not met"
    rows += [
        f"cold start {cold['median']} s ({cold['count']}); recovery {over} times that, "
        f"target {_TARGET}: {met}",
        f"steps lost to one fault: {lost['most']} at most; goodput {share:.1%}; "
        f"{result['attempts']} attempts, {len(result['not_by_faults'])} failed without a fault; "
        f"{result['outcome']}, {result['minutes']} minutes",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
