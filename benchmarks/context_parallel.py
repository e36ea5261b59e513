"""Context parallelism beside PyTorch's ring attention, and what cutting a sequence costs.

Three tables: one document and packed documents on two gloo ranks, each exchange beside PyTorch's
templated ring with ATen's attention for CPUs (which knows no documents); and, rank by rank on one
device with nothing travelling, how much longer the slowest of P ranks computes than a P-th of what
one rank does. Run: python benchmarks/context_parallel.py --out benchmarks/results/...
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from histogram import packed
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import Layout, balanced_layout, make_layout
from longspan.parallel.transport import DistributedTransport, Handle, Incoming, Outgoing, Underway
from torch import Tensor

HEADS, DIM = 8, 64
RANKS = 2
EXCHANGES: dict[str, dict[str, Any]] = {
    "ring": {},
    "all_gather": {},
    "fetch": {},
    "ulysses": {},
}
NODE = 8
SCALED = EXCHANGES | {
    "double_ring": {"inner": NODE},
    "two_d": {"inner": NODE, "across": "ring"},
}


class Silence:
    """The transport of one rank alone: what it receives are numbers of the right shape."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def trade(self, sends: list[Outgoing], receives: list[Incoming]) -> Handle:
        """See `Transport`."""
        shapes = [(like, (length, *like.shape[1:])) for _, length, like in receives]
        return Underway([], [like.new_full(shape, 0.1) for like, shape in shapes])

    def all_gather(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        return Underway([], [tensor.expand(self.size, *tensor.shape)])

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        return Underway([], [tensor[self.rank]])


def causal_pairs(tokens: int) -> float:
    """Visible pairs of a document's first tokens."""
    return tokens * (tokens + 1) / 2


def layout_of(kind: str, cu: list[int], ranks: int) -> Layout:
    """A layout by its name."""
    if kind == "balanced":
        return balanced_layout(cu, ranks, causal_pairs)
    return make_layout(kind, cu[-1], ranks)  # type: ignore[arg-type]


def tensors(tokens: int) -> list[Tensor]:
    """Queries, keys, values and the output's gradient."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HEADS, DIM, generator=draw) for _ in range(4)]


def ours(kind: str, layout: Layout, cu: list[int], transport: Any, how: Any) -> Callable[[], Any]:
    """One forward and backward of an exchange, planned anew as for a new micro-batch."""
    index = layout.index(transport.rank)
    q, k, v, dout = tensors(len(index))

    def run() -> None:
        exchange = make_exchange(kind, layout, transport, **how)  # type: ignore[arg-type]
        reach = Reach.documents(cu).rows(index)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, _ = exchange.attend(*leaves, reach, scale=DIM**-0.5)
        torch.autograd.grad(out, leaves, dout)

    return run


def theirs(tokens: int, rotate: str) -> Callable[[], Any]:
    """PyTorch's ring over all ranks, causal, balanced head to tail.

    Args:
        tokens: Of a rank.
        rotate: `alltoall` for a ring, `allgather` for what PyTorch does unless told otherwise.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as peer

    q, k, v, dout = (x.transpose(0, 1)[None].contiguous() for x in tensors(tokens))
    group, ops = dist.group.WORLD, torch.ops.aten
    forward = ops._scaled_dot_product_flash_attention_for_cpu
    backward = ops._scaled_dot_product_flash_attention_for_cpu_backward

    def run() -> None:
        peer.set_rotate_method(rotate)
        out, lse = peer._templated_ring_attention(
            group, 2, forward, query=q, key=k, value=v, is_causal=True, dropout_p=0.0
        )[:2]
        peer._templated_ring_attention_backward(
            group, 2, backward, grad_out=dout, grad_out_name="grad_out", query=q, key=k, value=v,
            out=out, logsumexp=lse, is_causal=True, dropout_p=0.0,
        )  # fmt: skip

    return run


def seconds_of(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of every turn but the first, one after the other; of the slowest rank."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            dist.barrier()
            begun = time.perf_counter()
            run()
            took = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:
                found[name].append(float(took))
    return found


def on_ranks(rank: int, store: str, args: argparse.Namespace, results: Any) -> None:
    """Both tables of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    transport = DistributedTransport()
    cases = {
        "one document": ([0, args.dense], "zigzag"),
        "packed documents": (packed("prolong64k", args.packed, seed=0), "balanced"),
    }
    rows = []
    for title, (cu, kind) in cases.items():
        layout = layout_of(kind, cu, RANKS)
        tokens = cu[-1] // RANKS
        runs = {
            "PyTorch's ring": theirs(tokens, "alltoall"),
            "PyTorch's ring, gathered": theirs(tokens, "allgather"),
        }
        for name, how in EXCHANGES.items():
            runs[name] = ours(name, layout, cu, transport, how)
        seconds = seconds_of(runs, args.turns)
        base = seconds["PyTorch's ring"]
        for name, took in seconds.items():
            ratios = [a / b for a, b in zip(base, took, strict=True)]
            rows.append({"case": title, "tokens": cu[-1], "documents": len(cu) - 1, "layout": kind,
                         "exchange": name, "times_pytorch": statistics.median(ratios),
                         "of_each_turn": ratios})  # fmt: skip
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def cut_up(args: argparse.Namespace) -> list[dict[str, Any]]:
    """How much longer the slowest rank takes than its share, nothing travelling."""
    cu = [0, args.cut]
    whole = best(ours("ring", make_layout("zigzag", args.cut, 1), cu, Silence(0, 1), {}))
    rows = []
    for ranks in args.ranks:
        for name, how in SCALED.items():
            if (name == "ulysses" and ranks > HEADS) or (how and ranks <= NODE):
                continue
            layout = layout_of("zigzag", cu, ranks)
            # The last, the middle and the first: zigzag gives all the same work.
            some = sorted({0, ranks // 2, ranks - 1})
            took = [best(ours(name, layout, cu, Silence(rank, ranks), how)) for rank in some]
            rows.append({"exchange": name, "ranks": ranks, "tokens": args.cut,
                         "slowest_to_share": max(took) * ranks / whole})  # fmt: skip
            print(f"{ranks:>4} {name:<14} {rows[-1]['slowest_to_share']:.2f}", flush=True)
    return rows


def best(run: Callable[[], Any], turns: int = 3) -> float:
    """Seconds of the fastest turn; noise only adds."""
    found = []
    for _ in range(turns):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=int, default=8192, help="tokens of one document")
    parser.add_argument("--packed", type=int, default=16384, help="tokens of packed documents")
    parser.add_argument("--cut", type=int, default=16384, help="tokens that are cut up")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    args = arguments()
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_ranks, (f"{folder}/store", args, results), RANKS)
    beside = results.get()
    for row in beside:
        print(f"{row['case']:<18} {row['exchange']:<25} {row['times_pytorch']:.2f}x PyTorch's ring")
    torch.set_num_threads(1)
    result = {
        "beside_pytorch": beside,
        "cut_up": cut_up(args),
        "shape": {"heads": HEADS, "dim": DIM, "dtype": "float32"},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per rank",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
