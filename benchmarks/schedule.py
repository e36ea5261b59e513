"""Schedules of documents beside Megatron's `BalancedCPScheduler`, on the same lengths in one run.

Balance is useful work as a share of what the ranks could do until the slowest of each micro-batch
(Megatron: of each group, which ends with a barrier) is done. Megatron computes the documents of a
group one after the other, so that the capacity bounds each, and not what they are together.
Run: python benchmarks/schedule.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import longspan.trainer.engine  # noqa: F401  prepares this process for megatron
from histogram import NAMES, draw
from longspan.parallel.schedule import DocumentCost, Schedule, schedule
from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

# Megatron's measure is the square of a length. A layer 4,096 wide without its attention takes
# 24 x 4096^2 operations for a token, and attention 4 x 4096 for a visible pair.
COSTS = {
    "squares": DocumentCost(pairs=lambda tokens: tokens**2),
    "attention + linear": DocumentCost(pair=1.0, token=6 * 4096),
}


def megatron(lengths: list[int], ranks: int, capacity: int) -> list[list[list[int]]]:
    """The numbers of the documents that each rank works on, for each of Megatron's groups."""
    scheduler = BalancedCPScheduler(capacity, SimpleNamespace(size=lambda: ranks))
    return scheduler.get_groups_and_subsamples([*enumerate(lengths)], None)[1]


def megatron_balance(
    groups: list[list[list[int]]], lengths: list[int], cost: DocumentCost
) -> float:
    """Balance, if the ranks that share a document share its work equally."""
    spent = 0.0
    for ranks in groups:
        degree = Counter(document for documents in ranks for document in documents)
        loads = [sum(cost(lengths[d]) / degree[d] for d in documents) for documents in ranks]
        spent += max(loads) * len(ranks)
    return sum(cost(length) for length in lengths) / spent


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """A result, and the fewest milliseconds of a processor's time: noise only adds."""
    result, times = run(), list[float]()
    for _ in range(repeats):
        begun = time.process_time()
        result = run()
        times.append((time.process_time() - begun) * 1e3)
    return result, min(times)


def measure(name: str, per_rank: int, cost: DocumentCost, args: argparse.Namespace) -> dict:
    """Both schedulers on the same lengths, one seed after the other."""
    cases: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        lengths = draw(name, per_rank * args.ranks, seed, args.ranks * args.capacity)
        ours: Schedule
        ours, ms = timed(lambda x=lengths: schedule(x, args.ranks, args.capacity, cost), 20)
        theirs, their_ms = timed(lambda x=lengths: megatron(x, args.ranks, args.capacity), 1)
        cases.append(
            {
                "balance": ours.balance(cost),
                "micro_batches": len(ours.micro_batches),
                "least_micro_batches": -(-sum(lengths) // (args.ranks * args.capacity)),
                "cut": sum(degree > 1 for degree in ours.degrees().values()),
                "ms": ms,
                "megatron_balance": megatron_balance(theirs, lengths, cost),
                "megatron_groups": len(theirs),
                "megatron_ms": their_ms,
            }
        )
    return {key: [case[key] for case in cases] for key in cases[0]}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    balance, theirs = row["balance"], row["megatron_balance"]
    numbers = f"{min(balance):8.3f}{statistics.mean(balance):8.3f}"
    numbers += f"{statistics.mean(row['micro_batches']):8.1f}{statistics.median(row['ms']):8.1f}"
    numbers += f"{min(theirs):10.3f}{statistics.mean(theirs):8.3f}"
    numbers += f"{statistics.mean(row['megatron_groups']):8.1f}"
    numbers += f"{statistics.median(row['megatron_ms']):8.1f}"
    return f"{row['lengths']:<12}{row['per_rank']:>4}  {row['cost']:<20}{numbers}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=8192, help="tokens of a rank")
    parser.add_argument("--per-rank", type=int, nargs="+", default=[4, 16], help="documents")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    args = arguments()
    packages = ("megatron-core", "numpy", "torch")
    about = {
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "ranks": args.ranks,
        "capacity": args.capacity,
    }
    print(f"{'':<38}{'longspan: balance':<18}{'micro-':>6}{'':>8}  megatron: balance")
    heads = (
        f"{'min':>8}{'mean':>8}{'batches':>8}{'ms':>8}{'min':>10}{'mean':>8}{'groups':>8}{'ms':>8}"
    )
    print(f"{'lengths':<12}{'N':>4}  {'cost':<20}{heads}")
    rows: list[dict[str, Any]] = []
    for cost in COSTS:
        for per_rank in args.per_rank:
            for name in NAMES:
                about_row = {"lengths": name, "per_rank": per_rank, "cost": cost}
                rows.append(about_row | measure(name, per_rank, COSTS[cost], args))
                print(line(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
