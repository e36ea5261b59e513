"""Bench: what a row of a benchmark of kernels measures, and how."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.backends import use
from longspan.kernels.blocks import Blocks
from longspan.kernels.reach import Reach
from torch import Tensor


@dataclass
class Row:
    """One measurement.

    Attributes:
        name: What was computed, and by whom.
        length: Tokens.
        forward_ms: Median of a turn; the fastest turn.
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


@dataclass
class Job:
    """What a row measures.

    Attributes:
        name: Of the row.
        pairs: Visible pairs of one head.
        forward: Gives what `backward` takes.
        backward: None where there is none.
        within: Makes the context that both run in.
    """

    name: str
    pairs: int
    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


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

    def rows(self, jobs: Iterable[Job]) -> list[Row]:
        """Measures all jobs, by turns: where a machine slows down, all of them are slower.

        Of several turns the fastest counts, since noise only adds; on a GPU there is one.
        """
        jobs = [*jobs]
        rows = [Row(job.name, self.length, pairs=job.pairs) for job in jobs]
        for turn in range(self.args.turns):
            self._warm = turn > 0
            for job, row in zip(jobs, rows, strict=True):
                self._turn(job, row)
        for row in rows:
            print(line(row), flush=True)
        return rows

    def _turn(self, job: Job, row: Row) -> None:
        flops, given = 4 * self.args.dim * self.args.heads * job.pairs, None
        try:
            with job.within():
                self._reset()
                forward_ms, given = self._time(job.forward)
                row.forward_ms = min(forward_ms, row.forward_ms or forward_ms)
                row.forward_tflops = flops / row.forward_ms / 1e9
                backward = job.backward
                if backward is not None:
                    backward_ms, _ = self._time(lambda: backward(given))
                    row.backward_ms = min(backward_ms, row.backward_ms or backward_ms)
                    row.backward_tflops = 2.5 * flops / row.backward_ms / 1e9
                row.peak_gib = self._peak()
        except Exception as error:  # whatever a library's compiler raises: the other rows go on
            row.error = (str(error) or type(error).__name__).splitlines()[0][:160]

    def ours(self, title: str, name: str, reach: Reach, blocks: Blocks | None, pairs: int) -> Job:
        """`attend` and its backward; by the table's choice or by a backend's name."""
        inputs = self.q, self.k, self.v
        asked = name.removeprefix("longspan").strip()
        kept: dict[Any, Any] = {}

        def forward() -> tuple[Tensor, Tensor]:
            if blocks is not None:
                blocks.made.clear()
            given = attend(*inputs, reach, blocks, scale=self.scale)
            if blocks is not None:
                kept.update(blocks.made)
            return given

        def backward(given: tuple[Tensor, Tensor]) -> Any:
            if blocks is not None:  # each pays for what its forward has not left behind
                blocks.made.clear()
                blocks.made.update(kept)
            return attend_backward(self.dout, *inputs, *given, reach, blocks, scale=self.scale)

        within = partial(use, asked) if asked else nullcontext
        return Job(f"{title}{name}", pairs, forward, backward, within)

    def _time(self, run: Callable[[], Any]) -> tuple[float, Any]:
        given = None
        if not self._warm:
            given = run()  # warms up, and compiles
            self._wait()
            given = None  # a second result beside it would count as memory that the call needs
        begun = time.perf_counter()
        given = run()
        self._wait()
        once = time.perf_counter() - begun
        repeats = min(self.args.repeats, int(self.args.seconds / max(once, 1e-6)))
        if self.device.type == "cuda":
            given = None
            return self._on_gpu(run, max(1, repeats))
        times = [once]
        for _ in range(repeats):
            given = None
            begun = time.perf_counter()
            given = run()
            times.append(time.perf_counter() - begun)
        return statistics.median(times) * 1e3, given

    def _on_gpu(self, run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
        """As in training, where the host is ahead of the GPU: calls follow each other at once."""
        given = run()  # while it runs, the host gets ahead
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            given = None
            given = run()
            mark.record()
        self._wait()
        times = [a.elapsed_time(b) for a, b in pairwise(marks)]
        return statistics.median(times), given

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


def line(row: Row) -> str:
    """A row of the table."""

    def number(value: float | None, form: str) -> str:
        return format("-" if value is None else format(value, form), ">9")

    numbers = [number(x, ".2f") for x in (row.forward_ms, row.backward_ms)]
    numbers += [number(x, ".3g") for x in (row.forward_tflops, row.backward_tflops, row.peak_gib)]
    return f"{row.length:>8} {row.name:<36}{' '.join(numbers)}  {row.error or ''}"
