"""Work: which program of a launch serves which choices of which block.

Made on the device, without waiting for it: a launch has as many programs as there can be.

Shapes: Z segments (lists of choices: one per segment head and block), P choices, I programs.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Segments cut into splits of at most `split` choices, the last of each shorter.

    Attributes:
        begin_Z: First choice of each segment, int64.
        end_Z: One past the last.
        item_Z: First program of each segment, int64.
        segment_I: Segment of each program; one past the last for a program without work. int32.
        split: Choices of a program.
    """

    begin_Z: Tensor
    end_Z: Tensor
    item_Z: Tensor
    segment_I: Tensor
    split: int

    @classmethod
    def of(cls, begin_Z: Tensor, end_Z: Tensor, split: int, choices: int) -> Work:
        """The work on some choices.

        Args:
            begin_Z: First choice of each segment.
            end_Z: One past the last.
            split: Choices of a program.
            choices: At least as many as there are in all segments.
        """
        splits_Z = splits_of(begin_Z, end_Z, split)
        ends_Z = splits_Z.cumsum(0)
        # Every segment has a program, be it to write zeros: hence one for each, and one more for
        # each full split.
        number_I = torch.arange(choices // split + len(begin_Z), device=begin_Z.device)
        segment_I = torch.searchsorted(ends_Z, number_I, right=True, out_int32=True)
        return cls(begin_Z, end_Z, ends_Z - splits_Z, segment_I, split)

    def __len__(self) -> int:
        return len(self.segment_I)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As kernels take them."""
        return self.segment_I, self.item_Z, self.begin_Z, self.end_Z


def splits_of(begin_Z: Tensor, end_Z: Tensor, split: int) -> Tensor:
    """Programs of each segment."""
    return ((end_Z - begin_Z + (split - 1)) // split).clamp(min=1)


@triton.jit
def take(
    segment_I, item_Z, begin_Z, end_Z, split, blocks, segments,
):  # fmt: skip
    """What this program (axis 0) serves.

    Returns:
        The segment (`segments` if there is nothing to do), its segment head, its block, its first
        choice, the number of choices, and the number of the split.
    """
    item = tl.program_id(0)
    segment = tl.load(segment_I + item)
    busy = segment < segments
    at = tl.load(item_Z + segment, mask=busy, other=0)
    number = (item - at).to(tl.int32)
    begin = tl.load(begin_Z + segment, mask=busy, other=0) + number.to(tl.int64) * split
    count = tl.minimum(tl.load(end_Z + segment, mask=busy, other=0) - begin, split).to(tl.int32)
    return segment, segment // blocks, segment % blocks, begin, count, number


def cut(order_P: Tensor, starts_Z1: Tensor, before: int) -> Tensor:
    """The first choice of each segment that is not before a position, int64 [Z].

    Args:
        order_P: Positions, ascending in each segment.
        starts_Z1: Boundaries of the segments.
        before: The position.
    """
    segments = len(starts_Z1) - 1
    cuts = torch.empty_like(starts_Z1[:-1])
    tile = 128
    _cut[(triton.cdiv(segments, tile),)](
        order_P, starts_Z1, cuts, before, segments, len(order_P).bit_length(), TILE=tile
    )
    return cuts


@triton.jit(do_not_specialize=["before", "segments", "steps"])
def _cut(order, starts, cuts, before, segments, steps, TILE: tl.constexpr):
    segment = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = segment < segments
    low = tl.load(starts + segment, mask=live, other=0)
    high = tl.load(starts + segment + 1, mask=live, other=0)
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        early = tl.load(order + middle, mask=open_, other=0) < before
        low = tl.where(open_ & early, middle + 1, low)
        high = tl.where(open_ & ~early, middle, high)
    tl.store(cuts + segment, low, mask=live)
