"""What fetching brings, and in how many messages, for documents as they occur.

Counted from the plan, for dense causal attention inside documents: every figure but the
milliseconds is exact on any machine. Bytes are a mean over ranks of forward and backward in bf16
with gradients in fp32, relative to a ring's; messages are the most of a rank in a layer.
Run: python benchmarks/fetch.py [--seeds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from histogram import NAMES, packed
from longspan.attention.pairs import dense
from longspan.kernels.reach import Reach
from longspan.parallel.fetch import Fetch
from longspan.parallel.layout import Layout, balanced_layout, make_layout
from longspan.parallel.ranges import Needs
from longspan.parallel.volume import Call, volume_of

CALL = Call(heads=64, groups=4, dim=128, value_dim=128, wire=2)
LAYOUTS: dict[str, Callable[[list[int], int], Layout]] = {
    "balanced": lambda cu, ranks: balanced_layout(cu, ranks, dense),
    "zigzag": lambda cu, ranks: make_layout("zigzag", cu[-1], ranks),
    "contiguous": lambda cu, ranks: make_layout("contiguous", cu[-1], ranks),
}


def unused(reach: Reach, layout: Layout, needs: Needs) -> int:
    """Keys that a rank fetches and none of its rows sees."""
    found = 0
    for rank in range(layout.ranks):
        rows = reach.rows(layout.index(rank))
        edges = torch.zeros(len(reach) + 1, dtype=torch.int64)
        for bound_T, step in ((rows.first_T, 1), (rows.last_T, -1)):
            edges.index_add_(0, bound_T, torch.full((len(rows),), step))
        seen_S = edges.cumsum(0) > 0
        for owner in set(range(layout.ranks)) - {rank}:
            found += int((~seen_S[needs.positions(owner, needs.of(rank, owner))]).sum())
    return found


def planning(cu: list[int], layout: Layout, ranks: int) -> tuple[float, int]:
    """The fewest milliseconds of one core for one rank's plan of a new reach, and its rounds."""
    times, rounds = [], 0
    for rank in range(0, ranks, max(1, ranks // 8)):
        fetch = Fetch(layout, SimpleNamespace(rank=rank, size=ranks))
        reach = Reach.documents(cu).rows(layout.index(rank))
        begun = time.process_time()
        rounds = len(fetch._plan(reach).rounds)
        times.append((time.process_time() - begun) * 1e3)
    return statistics.median(times), rounds


def measure(name: str, ranks: int, kind: str, seed: int, tokens: int) -> dict[str, Any]:
    """One packing under one layout."""
    cu = packed(name, ranks * tokens, seed)
    layout, reach = LAYOUTS[kind](cu, ranks), Reach.documents(cu)
    needs = Needs(reach, layout)
    counts = needs.counts().fill_diagonal_(0)
    sent, ring = (
        [
            sum(volume_of(x, layout.sizes, rank, CALL, needs=counts.tolist()))
            for rank in range(ranks)
        ]
        for x in ("fetch", "ring")
    )
    loads = [reach.rows(layout.index(rank)).area() for rank in range(ranks)]
    ms, rounds = planning(cu, layout, ranks)
    return {
        "documents": len(cu) - 1,
        "unused_keys": unused(reach, layout, needs),
        "messages": int((2 * (counts > 0).sum(0) + (counts > 0).sum(1)).max()),
        "rounds": rounds,
        "tokens": max(layout.sizes) * ranks / cu[-1],
        "load": max(loads) * ranks / sum(loads),
        "bytes": sum(sent) / sum(ring),
        "bytes_of_the_busiest": max(sent) / max(ring),
        "planning_ms": ms,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def line(row: dict[str, Any]) -> str:
    """A row of the table: the worst of its seeds."""
    numbers = f"{max(row['unused_keys']):>8}{max(row['messages']):>10}{4 * row['ranks']:>6}"
    numbers += f"{max(row['rounds']):>8}{max(row['tokens']):>8.3f}{max(row['load']):>8.3f}"
    numbers += f"{statistics.mean(row['bytes']):>8.3f}"
    numbers += f"{max(row['bytes_of_the_busiest']):>9.3f}{max(row['planning_ms']):>10.1f}"
    return f"{row['lengths']:<12}{row['ranks']:>4}  {row['layout']:<12}{numbers}"


def main() -> None:
    """Count, print and write the result with what it ran on."""
    args = arguments()
    torch.set_num_threads(1)
    about = {
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "tokens_of_a_rank": args.tokens,
    }
    heads = f"{'unused':>8}{'messages':>10}{'4P':>6}{'rounds':>8}{'tokens':>8}{'load':>8}"
    heads += f"{'bytes':>8}{'busiest':>9}{'plan ms':>10}"
    print(f"{'lengths':<12}{'P':>4}  {'layout':<12}{heads}")
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        for name in NAMES:
            for kind in LAYOUTS:
                cases = [
                    measure(name, ranks, kind, seed, args.tokens) for seed in range(args.seeds)
                ]
                row: dict[str, Any] = {"lengths": name, "ranks": ranks, "layout": kind}
                rows.append(row | {key: [case[key] for case in cases] for key in cases[0]})
                print(line(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
