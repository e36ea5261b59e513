"""Windows: overlapping ranges of keys, each of which is pooled into one key.

Shapes: P windows, S keys, T query rows, C + 1 cuts between cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .boundaries import boundaries
from .mirror import Mirror
from .once import Once
from .reach import Reach


@dataclass(frozen=True, eq=False)
class Windows(Once):
    """Window p holds the keys [starts[p], stops[p]); none holds keys of two documents.

    Attributes:
        starts_P: First key of each window, strictly ascending, int64 [P] on the host.
        stops_P: One past the last key of each, ascending, int64 [P] on the host.
        length: Keys in a complete window.
        stride: From one window of a document to the next.
        keys: Number S of keys that the windows were cut from.
        given_C1: Where the keys are cut into cells, ascending from 0 to S, int64 [C + 1] on the
            host; None for where any of these windows begins or ends.
    """

    starts_P: Tensor
    stops_P: Tensor
    length: int
    stride: int
    keys: int
    given_C1: Tensor | None = None

    @classmethod
    def documents(
        cls, cu_seqlens: Tensor | Sequence[int], length: int, stride: int, *, tail: bool = False
    ) -> Windows:
        """Windows at every `stride` tokens of each packed document, the complete ones only.

        A document shorter than `length` has none.

        Args:
            cu_seqlens: Boundaries of the documents, ascending from 0, on the host.
            length: Tokens in a window.
            stride: At least 1 and at most `length`, so that no token is left out between two.
            tail: One more, shorter window per document where the complete ones do not end with
                it. Then every token is in a window.

        Raises:
            ValueError: A stride or boundaries that break these rules.
        """
        cu = boundaries(cu_seqlens, "cu_seqlens")
        if not 1 <= stride <= length:
            raise ValueError(f"windows of {length} tokens cannot be {stride} tokens apart: the "
                             "stride must be at least 1 and at most the length")  # fmt: skip
        sizes = cu.diff()
        complete = ((sizes - length) // stride + 1).clamp(min=0)
        ends = torch.where(complete > 0, (complete - 1) * stride + length, 0)
        counts = complete + (ends < sizes) if tail else complete
        document = torch.repeat_interleave(torch.arange(len(counts)), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        starts = cu[document] + (torch.arange(len(document)) - before) * stride
        stops = torch.minimum(starts + length, cu[document + 1])
        return cls(starts, stops, length, stride, int(cu[-1]))

    def __len__(self) -> int:
        return len(self.starts_P)

    def part(self, rows: Tensor, index_L: Tensor) -> Windows:
        """Some of the windows, over some of the keys.

        They are summed cell by cell as before, so that their sums are the same to the last bit.

        Args:
            rows: Numbers of the windows, ascending, int64 on the host.
            index_L: Positions of all keys of these windows and of no others, ascending, int64 on
                the host.
        """
        starts_P = torch.searchsorted(index_L, self.starts_P[rows])
        stops_P = torch.searchsorted(index_L, self.stops_P[rows])
        cuts_C1 = torch.searchsorted(index_L, self.cuts_C1).unique()
        return Windows(starts_P, stops_P, self.length, self.stride, len(index_L), cuts_C1)

    def reach(self, reach: Reach) -> Reach:
        """The windows that each query may see: those that lie wholly in its reach.

        Attention to pooled keys under this reach is the compressed branch of NSA (arXiv
        2502.11089, eq. 7); a query that sees no window yet has output 0.

        Args:
            reach: The keys that each query sees.
        """
        first_T = torch.searchsorted(self.starts_P, reach.first_T.contiguous())
        last_T = torch.searchsorted(self.stops_P, reach.last_T.contiguous(), right=True)
        return Reach(first_T, torch.maximum(first_T, last_T))

    @cached_property
    def ragged(self) -> bool:
        """Whether a window is shorter than the others."""
        return bool((self.stops_P - self.starts_P < self.length).any())

    @cached_property
    def starts(self) -> Mirror:
        """`starts_P` as int32 on other devices."""
        return Mirror(self.starts_P)

    @cached_property
    def stops(self) -> Mirror:
        """`stops_P` as int32 on other devices."""
        return Mirror(self.stops_P)

    @cached_property
    def first_of_key(self) -> Mirror:
        """The first window that ends after each key [S]; it holds the key if it begins by it."""
        return Mirror(torch.searchsorted(self.stops_P, torch.arange(self.keys), right=True))

    @cached_property
    def last_of_key(self) -> Mirror:
        """One past the last window that begins by each key [S]."""
        return Mirror(torch.searchsorted(self.starts_P, torch.arange(self.keys), right=True))

    @cached_property
    def cuts_C1(self) -> Tensor:
        """Boundaries of the cells, int64 [C + 1] on the host."""
        if self.given_C1 is not None:
            return self.given_C1
        ends = torch.tensor([0, self.keys])
        return torch.cat([self.starts_P, self.stops_P, ends]).unique()

    @cached_property
    def cells(self) -> Cells:
        """The windows cut where any of them begins or ends."""
        return Cells.of(self)


@dataclass(frozen=True, eq=False)
class Cells:
    """Disjoint ranges of keys of which every window is a run.

    Attributes:
        cuts: Boundaries of the ranges, from 0 to S, [cells + 1].
        first: First range of each window, [P].
        last: One past the last range of each window, [P].
        most: Most ranges in a window.
    """

    cuts: Mirror
    first: Mirror
    last: Mirror
    most: int

    @classmethod
    def of(cls, windows: Windows) -> Cells:
        """The cells of `windows`."""
        cuts_C1 = windows.cuts_C1
        first_P = torch.searchsorted(cuts_C1, windows.starts_P)
        last_P = torch.searchsorted(cuts_C1, windows.stops_P)
        most = int((last_P - first_P).max()) if len(windows) else 0
        return cls(Mirror(cuts_C1), Mirror(first_P), Mirror(last_P), most)
