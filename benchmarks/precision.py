"""Error of every exchange against the number of context ranks, in float32 and bfloat16.

Simulated ranks in one process; errors are those of float64, relative to the norm, beside the error
of one rank with the same dtype. Run: python benchmarks/precision.py --out benchmarks/results/...
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
from torch import Tensor

LENGTH, HEADS, GROUPS, DIM = 1024, 32, 4, 16
DOCUMENTS = [0, 100, 411, LENGTH]
EXCHANGES: dict[str, dict[str, Any]] = {
    "ring": {},
    "double_ring": {"inner": 4},
    "all_gather": {},
    "fetch": {},
    "ulysses": {},
    "two_d": {"inner": 4, "across": "ring"},
}
NAMES = "out", "dq", "dk", "dv"


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, the same numbers in every dtype."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    made = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes]
    # Rounded first: the error shall be that of the computation.
    return [x.to(torch.bfloat16).to(dtype) for x in made]


def attend(kind: str, ranks: int, dtype: torch.dtype, how: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of the whole sequence."""
    layout, given = make_layout("zigzag", LENGTH, ranks), tensors(dtype)

    def on_rank(transport: Any) -> tuple[Tensor, ...]:
        index = layout.index(transport.rank)
        q, k, v, dout = (x[index] for x in given)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        exchange = make_exchange(kind, layout, transport, **how)  # type: ignore[arg-type]
        reach = Reach.documents(DOCUMENTS).rows(index)
        out, _ = exchange.attend(*leaves, reach, scale=DIM**-0.5)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    parts = simulate(ranks, on_rank)
    order = torch.cat([layout.index(rank) for rank in range(ranks)]).argsort()
    return [torch.cat(part)[order] for part in zip(*parts, strict=True)]


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    exact, rows = attend("ring", 1, torch.float64, {}), []
    for dtype in (torch.float32, torch.bfloat16):

        def errors(found: list[Tensor]) -> list[float]:
            pairs = zip(found, exact, strict=True)
            return [float((x.double() - y).norm() / y.norm()) for x, y in pairs]

        alone = errors(attend("ring", 1, dtype, {}))
        for kind, how in EXCHANGES.items():
            for ranks in args.ranks:
                if how and ranks <= how["inner"]:
                    continue
                found = errors(attend(kind, ranks, dtype, how))
                ratios = {n: e / a for n, e, a in zip(NAMES, found, alone, strict=True)}
                rows.append({"dtype": str(dtype), "exchange": kind, "ranks": ranks,
                             "to_one_rank": ratios, "largest": max(ratios.values())})  # fmt: skip
                print(f"{dtype} {kind:<12}{ranks:>4}  {max(ratios.values()):.3f}", flush=True)
    result = {
        "rows": rows,
        "shape": {"tokens": LENGTH, "heads": HEADS, "groups": GROUPS, "dim": DIM,
                  "documents": DOCUMENTS, "layout": "zigzag"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
