"""Attention kernels beside the fastest dense kernel of the same run.

Rows: dense, windowed and packed attention, attention over chosen blocks, selecting them, and the
two together; forward and backward. Visible FLOPs: 4 D for each visible (query, key) pair and query
head forward, 2.5 times that backward; what a kernel computes beyond them counts as time. A CPU's
numbers are ratios between two programs on one machine, nothing more.
Run: python benchmarks/kernels.py [--lengths 16384 32768] [--groups 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Row
from kernel_jobs import dense, peers, sparse


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured: matrix products (TFLOP/s) and copies (GB/s, read and written)."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    big, other = torch.ones(2, 2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    found = {}
    jobs = {
        "matmul_tflops": (lambda: a @ a, 2 * size**3 / 1e12),
        "copy_gb_per_s": (lambda: other.copy_(big), 2 * len(big) / 1e9),
    }
    for name, (run, amount) in jobs.items():
        run()
        times = []
        for _ in range(5):
            if cuda:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        found[name] = amount / statistics.median(times)
    return found


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """Each row of ours over the fastest dense causal kernel of others: forward, backward, both."""
    found = []
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length and row.error is None]
        others = [row for row in here if "longspan" not in row.name and row.backward_ms]
        if not others:
            continue
        forward = min(row.forward_ms for row in others if row.forward_ms)
        backward = min(row.backward_ms for row in others if row.backward_ms)
        for row in here:
            if "longspan" in row.name and row.forward_ms and row.backward_ms:
                both = row.forward_ms + row.backward_ms
                times = forward / row.forward_ms, backward / row.backward_ms
                ratio = {
                    "forward": times[0],
                    "backward": times[1],
                    "both": (forward + backward) / both,
                }
                found.append({"name": row.name, "length": length, **ratio})
    return found


def versions() -> dict[str, str]:
    """What took part."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "cuda-core", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--heads", type=int, default=64 if cuda else 8)
    parser.add_argument("--groups", type=int, nargs="+", default=[4] if cuda else [2])
    parser.add_argument("--dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--turns", type=int, default=1 if cuda else 3)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement, about")
    parser.add_argument("--peers-up-to", type=int, default=2**18, metavar="LENGTH")
    parser.add_argument("--dense-up-to", type=int, default=2**18, metavar="LENGTH")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    args = arguments()
    device = torch.device(args.device)
    names = "forward ms", "back ms", "TFLOP/s", "back", "peak GiB"
    print(f"{'length':>8} {'':<36}{' '.join(format(name, '>9') for name in names)}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    about = {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "heads": args.heads,
        "dim": args.dim,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "ceilings": ceilings(device),
    }
    results = []
    for groups in args.groups:
        rows: list[Row] = []
        result: dict[str, Any] = {"groups": groups}
        results.append(result)
        for length in args.lengths:
            rows += measured(Bench(args, length, groups))
            result |= {"rows": [asdict(row) for row in rows], "ratios": ratios(rows)}
            if args.out:  # what is measured stays, whatever happens to the rest
                args.out.write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
        for ratio in result["ratios"]:
            shown = " ".join(f"{k} {v:.2f}x" for k, v in ratio.items() if isinstance(v, float))
            print(f"{ratio['length']:>8} {ratio['name']:<36}{shown}")


def measured(bench: Bench) -> list[Row]:
    """All rows of a shape."""
    jobs = [*peers(bench)] if bench.length <= bench.args.peers_up_to else []
    if bench.length <= bench.args.dense_up_to:
        jobs += dense(bench)
    return bench.rows([*jobs, *sparse(bench)])


if __name__ == "__main__":
    main()
