"""Shape: the numbers that the kernels over chosen blocks are compiled for.

Shapes: T query rows, S keys, H query heads, G key-value heads, C block heads, Q query groups,
N blocks per choice, D key dim, V value dim.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from ..blocks import Blocks
from ..reach import Reach
from ..scoring import Scoring
from .tuning import size_class

ROWS_OF_A_DOT = 16
"""Fewer rows than this waste most of a matrix product."""

BLOCK_OF_A_DOT = 16
"""The same for the keys of a block."""


TUNED_BY = ["C", "G", "N", "L", "R", "M", "D", "V", "CAP", "GROUPED", "LONG", "query_class"]
"""Arguments of a kernel whose change asks for another search of launch options."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    A *unit* is the finest set of neighbouring query heads with one block head and one key-value
    head. A *segment head* is the coarsest set of heads whose choices are sorted together.

    Attributes:
        chooser: Block heads C.
        groups: Key-value heads G.
        width: Blocks N per choice.
        block: Keys L of the largest block, rounded up so that few kernels are compiled.
        rows: Query heads R of a unit.
        tokens: Query rows M of the largest query group.
        dim: D.
        value_dim: V.
        blocks: Blocks B of the grid.
        queries: Query groups Q.
        item: Bytes of an element of the inputs.
    """

    chooser: int
    groups: int
    width: int
    block: int
    rows: int
    tokens: int
    dim: int
    value_dim: int
    blocks: int
    queries: int
    item: int

    @classmethod
    def of(cls, q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, blocks: Blocks) -> Shape:
        """The shape of a call that `Request` has checked."""
        queries, chooser, width = blocks.ids_QCN.shape
        groups, largest = k_SGD.shape[1], blocks.grid.largest
        block = triton.next_power_of_2(largest) if largest <= 16 else -(-largest // 16) * 16
        rows = q_THD.shape[1] // max(chooser, groups)
        dims = q_THD.shape[2], v_SGV.shape[2]
        return cls(
            chooser, groups, width, block, rows, blocks.tokens, *dims, len(blocks.grid), queries,
            q_THD.element_size(),
        )  # fmt: skip

    @property
    def units(self) -> int:
        """Sets of query heads that share a block head and a key-value head."""
        return max(self.chooser, self.groups)

    @property
    def segment_heads(self) -> int:
        """Sets of heads whose choices are sorted together."""
        return min(self.chooser, self.groups)

    @property
    def segments(self) -> int:
        """Lists of choices: one per segment head and block."""
        return self.segment_heads * self.blocks

    @property
    def served(self) -> int:
        """Key-value heads of a segment head."""
        return self.groups // self.segment_heads

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.units * self.rows

    @property
    def rows_of_choice(self) -> int:
        """Most rows that one choice brings to a key-value head."""
        return self.rows * self.tokens

    @property
    def choices(self) -> int:
        """P, those of nothing included."""
        return self.queries * self.chooser * self.width

    @property
    def by_row(self) -> bool:
        """Whether queries look up their blocks in the forward, or blocks gather their queries.

        By row, a choice costs the keys and values of its block: 32 KiB of the L2 cache for 64 keys
        of 128 dims in bf16 (8 TB/s on an H200). By block it costs its rows and their partial
        results: 0.75 KiB per row, most of it from device memory (4 TB/s). The two meet near 16
        rows. Single keys have no partial results worth writing.
        """
        return self.rows_of_choice > ROWS_OF_A_DOT or self.block < BLOCK_OF_A_DOT

    @property
    def by_row_back(self) -> bool:
        """The same for dq in the backward, where by block a row costs a third more."""
        return self.rows_of_choice >= ROWS_OF_A_DOT or self.block < BLOCK_OF_A_DOT

    @property
    def key_tile(self) -> int:
        """Keys that a program holds when blocks gather their queries."""
        wide = max(self.dim, self.value_dim) > 128
        # Products in fp32 keep whole rows of their operands in registers.
        most = 32 if self.item > 2 else 64 if wide else 128
        return min(max(16, triton.next_power_of_2(self.block)), most)

    @property
    def key_tiles(self) -> int:
        """Tiles of a block."""
        return -(-self.block // self.key_tile)

    def constants(self, scoring: Scoring, grouped: bool, long: bool = False) -> dict[str, Any]:
        """Those that every kernel takes; `long` for offsets beyond 32 bits."""
        padded = [max(16, triton.next_power_of_2(d)) for d in (self.dim, self.value_dim)]
        cap, biased = scoring.softcap is not None, scoring.key_bias_SH is not None
        return {
            "C": self.chooser, "G": self.groups, "N": self.width, "L": self.block, "R": self.rows,
            "M": self.tokens, "D": self.dim, "V": self.value_dim, "DP": padded[0], "VP": padded[1],
            "CAP": cap, "BIASED": biased, "GROUPED": grouped, "BYTES": self.item, "LONG": long,
            "PLAIN": scoring.scale > 0 and not cap and not biased,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call as the kernels take them.

    Attributes:
        q: Queries, like k and v with a dense last dim.
        k: Keys.
        v: Values.
        bias: Biases of the keys, or any tensor if there are none.
        where: Numbers of chosen blocks, their boundaries, those of the query groups, and the
            reach; all on the device.
        score: Scale, soft cap (1 if there is none), and a class of lengths to tune for.
        shape: Sizes.
        constants: Of every kernel.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    where: tuple[Tensor, ...]
    score: tuple[float, float, int]
    shape: Shape
    constants: dict[str, Any]

    @classmethod
    def of(
        cls, q_THD: Tensor, k_SGD: Tensor, v_SGV: Tensor, reach: Reach, blocks: Blocks,
        scoring: Scoring, dout_THV: Tensor | None = None,
    ) -> Inputs:  # fmt: skip
        """The inputs of a call."""
        device, bias = q_THD.device, scoring.key_bias_SH
        shape = Shape.of(q_THD, k_SGD, v_SGV, blocks)
        starts = blocks.grid.mirror.on(device)
        groups = starts if blocks.starts is None else blocks.starts.on(device)
        bounds = reach.first.on(device), reach.last.on(device)
        q, k, v = (dense(x) for x in (q_THD, k_SGD, v_SGV))
        # Keys are always far apart. A query group has its parts in the buffer, however large.
        rows = max(len(q), shape.tokens * shape.width * shape.key_tiles) * shape.heads
        largest = rows * max(shape.dim, shape.value_dim)
        given = (q,) if dout_THV is None else (q, dout_THV)
        long = max(largest, *(_extent(x) for x in given)) >= 2**31
        constants = shape.constants(scoring, blocks.starts is not None, long)
        return cls(
            q, k, v, starts if bias is None else bias,
            (blocks.ids_QCN.contiguous(), starts, groups, *bounds),
            (float(scoring.scale), float(scoring.softcap or 1.0), size_class(shape.queries)),
            shape, constants,
        )  # fmt: skip

    @property
    def strides(self) -> tuple[int, ...]:
        """Of tokens and heads of q, k and v, and of the biases."""
        bias = self.bias.stride() if self.bias.ndim == 2 else (0, 0)
        tensors = (self.q, self.k, self.v)
        return (*(x.stride(i) for x in tensors for i in (0, 1)), *bias)


def _extent(x: Tensor) -> int:
    """From the first element to behind the last."""
    return sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1


def dense(x: Tensor) -> Tensor:
    """`x` with a dense last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def nothing_chosen(shape: Shape) -> bool:
    """Whether no query can see anything."""
    return 0 in (shape.queries, shape.width, shape.blocks, shape.block, shape.tokens, shape.rows)
