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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.backends import TABLE, choose, use
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.pool import pool
from longspan.kernels.reach import Reach
from longspan.kernels.request import Request
from longspan.kernels.scoring import Scoring
from longspan.kernels.selection import select_blocks
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.windows import Windows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BLOCK, CHOSEN = 64, 16


@dataclass
class Row:
    """One measurement.

    Attributes:
        name: What was computed, and by whom.
        length: Tokens.
        forward_ms: Median.
        backward_ms: Median; None where there is no backward.
        pairs: Visible (query, key) pairs of one head.
        forward_tflops: Visible FLOPs per second.
        backward_tflops: The same backward.
        peak_gib: Most GPU memory during the two, beyond the inputs.
        error: Why there is no number.
    """

    name: str
    length: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    pairs: int = 0
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    peak_gib: float | None = None
    error: str | None = None


class Bench:
    """One shape on one device: measures pairs of forward and backward."""

    def __init__(self, args: argparse.Namespace, length: int, groups: int) -> None:
        self.args, self.length, self.device = args, length, torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        heads, dim = args.heads, args.dim
        draw = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(*shape, generator=draw, device=self.device, dtype=torch.float32)
            return x.to(self.dtype)

        self.q, self.dout = normal(length, heads, dim), normal(length, heads, dim)
        self.k, self.v = normal(length, groups, dim), normal(length, groups, dim)
        self.scale = dim**-0.5

    def row(
        self,
        name: str,
        pairs: int,
        forward: Callable[[], Any],
        backward: Callable[[Any], Any] | None = None,
    ) -> Row:
        """Times a forward and, with what it gave, a backward."""
        row = Row(name, self.length, pairs=pairs)
        flops = 4 * self.args.dim * self.args.heads * pairs
        given = None
        try:
            self._reset()
            row.forward_ms, given = self._time(forward)
            row.forward_tflops = flops / row.forward_ms / 1e9
            if backward is not None:
                row.backward_ms, _ = self._time(lambda: backward(given))
                row.backward_tflops = 2.5 * flops / row.backward_ms / 1e9
            row.peak_gib = self._peak()
        except Exception as error:  # whatever a library's compiler raises: the other rows go on
            row.error = (str(error) or type(error).__name__).splitlines()[0][:160]
        print(line(row), flush=True)
        return row

    def ours(self, title: str, name: str, reach: Reach, blocks: Blocks | None, pairs: int) -> Row:
        """`attend` and its backward; by the table's choice or by a backend's name."""
        inputs = self.q, self.k, self.v
        asked = nullcontext() if name == "longspan" else use(name.removeprefix("longspan "))
        kept: dict[int, Any] = {}

        def forward() -> tuple[Tensor, Tensor]:
            if blocks is not None:
                blocks.inverses.clear()
            given = attend(*inputs, reach, blocks, scale=self.scale)
            if blocks is not None:
                kept.update(blocks.inverses)
            return given

        def backward(given: tuple[Tensor, Tensor]) -> Any:
            if blocks is not None:  # each pays for what its forward has not left behind
                blocks.inverses.clear()
                blocks.inverses.update(kept)
            return attend_backward(self.dout, *inputs, *given, reach, blocks, scale=self.scale)

        with asked:
            return self.row(f"{title}{name}", pairs, forward, backward)

    def _time(self, run: Callable[[], Any]) -> tuple[float, Any]:
        given = run()  # warms up, and compiles
        self._wait()
        given = None  # a second result beside the first would count as memory that the call needs
        begun = time.perf_counter()
        given = run()
        self._wait()
        once = time.perf_counter() - begun
        repeats = min(self.args.repeats, int(self.args.seconds / max(once, 1e-6)))
        times = [once]
        for _ in range(repeats):
            given = None
            begun = time.perf_counter()
            given = run()
            self._wait()
            times.append(time.perf_counter() - begun)
        return statistics.median(times) * 1e3, given

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def _peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return (torch.cuda.max_memory_allocated() - self._before) / 2**30


def peers(bench: Bench) -> Iterator[Row]:
    """Dense causal attention of others: every backend of SDPA, and flash-attn if it is there."""
    pairs = bench.length * (bench.length + 1) // 2
    kinds = [SDPBackend.FLASH_ATTENTION]
    if bench.device.type == "cuda":
        kinds += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    q, k, v = (x.transpose(0, 1)[None].detach() for x in (bench.q, bench.k, bench.v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    dout = bench.dout.transpose(0, 1)[None]

    def back(given: Tensor) -> Any:
        return torch.autograd.grad(given, (q, k, v), dout, retain_graph=True)

    for kind in kinds:
        with sdpa_kernel(kind):
            yield bench.row(
                f"SDPA {kind.name.split('_')[0].lower()}",
                pairs,
                lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                back,
            )
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            flash_attn_func = __import__(name).flash_attn_func
        except (ImportError, AttributeError):
            continue
        rows = [x.detach()[None].requires_grad_() for x in (bench.q, bench.k, bench.v)]

        def forward(call: Any = flash_attn_func, rows: Any = rows) -> Any:
            out = call(*rows, causal=True)
            return out[0] if isinstance(out, tuple) else out

        def backward(given: Any, rows: Any = rows) -> Any:
            return torch.autograd.grad(given, rows, bench.dout[None], retain_graph=True)

        yield bench.row(name, pairs, forward, backward)


def backends(bench: Bench, reach: Reach, blocks: Blocks | None) -> list[str]:
    """The table's choice, and every other backend made for the device that can serve the call."""
    if bench.device.type != "cuda":
        return ["longspan"]
    request = Request.of(bench.q, bench.k, bench.v, reach, blocks, Scoring(bench.scale))
    made = [b for b in TABLE if b.name != "eager" and b.refuses(request) is None]
    chosen = choose(request)
    names = [f"longspan {b.name}" for b in made if b.load() is not chosen]
    return names if len(names) == len(made) else ["longspan", *names]


def dense(bench: Bench) -> Iterator[Row]:
    """One causal document; a window of 4,096; eight packed documents of unequal length."""
    n = bench.length
    shares = [0.05, 0.3, 0.02, 0.2, 0.13, 0.1, 0.15]
    cu = [0, *(int(sum(shares[: i + 1]) * n) for i in range(len(shares))), n]
    reaches = {"": Reach.documents([0, n]), "packed ": Reach.documents(cu)}
    if n > 4096:
        reaches["window "] = Reach.documents([0, n], 4096)
    for kind, reach in reaches.items():
        for name in backends(bench, reach, None):
            yield bench.ours(kind, name, reach, None, reach.area())


def random_blocks(bench: Bench) -> tuple[Reach, Blocks]:
    """Per token and key-value head the first block, its own and 14 at random of those between.

    One from each of 14 runs of blocks, so that none is drawn twice.
    """
    n, groups, drawn = bench.length, bench.k.shape[1], CHOSEN - 2
    own_T11 = (torch.arange(n) // BLOCK)[:, None, None]
    edges_T1N = torch.arange(drawn + 1) * (own_T11 - 1).clamp(min=0) // drawn
    sizes_T1N = edges_T1N.diff()
    draw = torch.Generator().manual_seed(1)
    ids = (
        1 + edges_T1N[..., :-1] + (torch.rand(n, groups, drawn, generator=draw) * sizes_T1N).long()
    )
    ids = ids.masked_fill(sizes_T1N == 0, -1)
    fixed = torch.cat([torch.zeros_like(own_T11), own_T11], -1).expand(n, groups, 2)
    blocks = Blocks.choose(torch.cat([ids, fixed], -1), Grid.documents([0, n], BLOCK))
    return Reach.documents([0, n]), Blocks(blocks.ids_QCN.to(bench.device), blocks.grid)


def pairs_of(blocks: Blocks) -> int:
    """Visible pairs of a head in one causal document."""
    ids_TCN = blocks.ids_QCN
    at_T = torch.arange(len(ids_TCN), device=ids_TCN.device)
    own_T11 = (at_T // BLOCK)[:, None, None]
    whole = int(((ids_TCN >= 0) & (ids_TCN < own_T11)).sum()) * BLOCK
    seen_T11 = (at_T % BLOCK + 1)[:, None, None]
    return (whole + int(((ids_TCN == own_T11) * seen_T11).sum())) // ids_TCN.shape[1]


def sparse(bench: Bench) -> Iterator[Row]:
    """Attention over 16 chosen blocks of 64, choosing them with 32/16 pooling, and both."""
    reach, blocks = random_blocks(bench)
    pairs = pairs_of(blocks)
    for name in backends(bench, reach, blocks):
        yield bench.ours("selected ", name, reach, blocks, pairs)
    windows = Windows.documents([0, bench.length], 32, 16)
    rule = SelectionRule(CHOSEN, initial=1, local=2)

    def select() -> Blocks:
        pooled = pool(bench.k, windows, "mean")
        how = {"scale": bench.scale}
        return select_blocks(bench.q, pooled, windows, blocks.grid, reach, rule, **how)

    yield bench.row("selection longspan", 0, select)

    def forward() -> tuple[Blocks, tuple[Tensor, Tensor]]:
        chosen = select()
        return chosen, attend(bench.q, bench.k, bench.v, reach, chosen, scale=bench.scale)

    def backward(given: tuple[Blocks, tuple[Tensor, Tensor]]) -> Any:
        inputs = bench.dout, bench.q, bench.k, bench.v, *given[1], reach, given[0]
        return attend_backward(*inputs, scale=bench.scale)

    chosen = pairs_of(select())
    yield bench.row("selection and attention longspan", chosen, forward, backward)


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


def line(row: Row) -> str:
    """A row of the table."""

    def number(value: float | None, form: str) -> str:
        return format("-" if value is None else format(value, form), ">9")

    numbers = [number(x, ".2f") for x in (row.forward_ms, row.backward_ms)]
    numbers += [number(x, ".3g") for x in (row.forward_tflops, row.backward_tflops, row.peak_gib)]
    return f"{row.length:>8} {row.name:<36}{' '.join(numbers)}  {row.error or ''}"


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
    rows = [*peers(bench)] if bench.length <= bench.args.peers_up_to else []
    if bench.length <= bench.args.dense_up_to:
        rows += dense(bench)
    return [*rows, *sparse(bench)]


if __name__ == "__main__":
    main()
