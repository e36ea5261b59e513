"""Documents: the packed documents of a micro-batch, as this rank's queries see them.

Shapes: T query rows, S keys, P windows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..kernels.grid import Grid
from ..kernels.once import Once
from ..kernels.reach import Reach
from ..kernels.windows import Windows


class Documents(Once):
    """What is planned on the host once per micro-batch, on demand, and shared by all layers.

    Args:
        cu_seqlens: Boundaries of the documents, ascending from 0.
        index_T: Positions of the query rows among all tokens, ascending; None if they are all.
        final: Tokens that the only document will have when all of it is there; None if it is.
    """

    def __init__(
        self,
        cu_seqlens: Tensor | Sequence[int],
        index_T: Tensor | None = None,
        final: int | None = None,
    ) -> None:
        self.cu_seqlens = tuple(int(x) for x in cu_seqlens)
        self.index_T, self.final = index_T, final

    @property
    def keys(self) -> int:
        """Tokens of all documents."""
        return self.cu_seqlens[-1]

    @property
    def whole(self) -> bool:
        """Whether the query rows are all tokens."""
        return self.index_T is None

    def reach(self, window: int | None = None) -> Reach:
        """Causal attention inside each document, over at most `window` tokens."""

        def make() -> Reach:
            if self.index_T is None:
                return Reach.documents(self.cu_seqlens, window)
            return self.of_all.reach(window).rows(self.index_T)

        return self.once(("reach", window), make)

    def restricted(self, key: Hashable, make: Callable[[Documents], Reach]) -> Reach:
        """A reach planned for all tokens and restricted to the query rows, made once for each key.

        Reaches over tokens that other ranks may own are planned in this way: an exchange that
        moves queries, or plans for all ranks, then has to ask nobody (see `Reach.of_all`).

        Args:
            key: Tells the reach from others.
            make: Makes it from the same documents with all tokens as query rows.
        """

        def made() -> Reach:
            reach = make(self.of_all)
            return reach if self.index_T is None else reach.rows(self.index_T)

        return self.once(key, made)

    @property
    def of_all(self) -> Documents:
        """The same documents with all tokens as query rows."""
        if self.index_T is None:
            return self
        return self.once("of all", lambda: Documents(self.cu_seqlens, final=self.final))

    def grid(self, size: int) -> Grid:
        """Blocks of `size` tokens in each document, the last one shorter."""
        return self.once(("grid", size), lambda: Grid.documents(self.cu_seqlens, size))

    def windows(self, length: int, stride: int) -> Windows:
        """Complete windows of `length` tokens, `stride` tokens apart, in each document."""
        key = "windows", length, stride
        return self.once(key, lambda: Windows.documents(self.cu_seqlens, length, stride))

    def windows_seen(self, length: int, stride: int) -> Reach:
        """Those of these windows that lie wholly before or at each query."""
        key = "windows seen", length, stride
        return self.once(key, lambda: self.windows(length, stride).reach(self.reach()))

    def starts(self) -> Tensor:
        """Where the document of each query row begins, int64 [T] on the host."""
        return self.reach().first_T

    def rows(self) -> Tensor:
        """Positions of the query rows among all tokens, int64 [T] on the host."""
        return torch.arange(self.keys) if self.index_T is None else self.index_T

    def lengths(self) -> Tensor:
        """Tokens of each query row's document in the end, int64 [T] on the host."""

        def make() -> Tensor:
            sizes = torch.tensor(self.cu_seqlens).diff()
            sizes_T = torch.repeat_interleave(sizes, sizes)[self.rows()]
            return sizes_T if self.final is None else torch.full_like(sizes_T, self.final)

        return self.once("lengths", make)
