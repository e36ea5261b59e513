"""Reach: which keys each query may see, as one interval of key positions per query.

Shapes: T query rows, S local keys.
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
from .pieces import RowGroup, plan_pieces


@dataclass(frozen=True, eq=False)
class Reach(Once):
    """For each query row the half-open interval [first, last) of key positions that it sees.

    The bounds live on the host: planning happens there, once per micro-batch, so that attention
    on a device never waits for it. A row with first >= last sees nothing.

    Attributes:
        first_T: First visible key of each row, int64 [T] on the host.
        last_T: One past the last visible key of each row, int64 [T] on the host.
        cu_seqlens: Document boundaries that the reach was built from, or None if it was
            restricted since, so that a kernel for packed documents may not assume them.
        window: Tokens visible to a row, itself included; None for all earlier ones.
        whole: The reach of all rows of the sequence; None if these are all, or if the keys were
            restricted since.
        index_T: Which of those rows these are, int64 [T] on the host; None where `whole` is.
    """

    first_T: Tensor
    last_T: Tensor
    cu_seqlens: tuple[int, ...] | None = None
    window: int | None = None
    whole: Reach | None = None
    index_T: Tensor | None = None

    def __post_init__(self) -> None:
        for bound in (self.first_T, self.last_T):
            if bound.dtype != torch.int64 or bound.device.type != "cpu":
                raise ValueError(f"bounds of a reach must be int64 on the host, not {bound}")
            if bound.shape != (len(self.first_T),):
                raise ValueError(f"bounds of a reach must be [T], not {list(bound.shape)}")
        assert (self.whole is None) == (self.index_T is None)

    @classmethod
    def documents(cls, cu_seqlens: Tensor | Sequence[int], window: int | None = None) -> Reach:
        """Causal attention inside each packed document.

        Args:
            cu_seqlens: Boundaries of the documents, ascending from 0, on the host.
            window: Visible tokens, the query's own included (at least 1); None for all.

        Raises:
            ValueError: Boundaries that do not ascend from 0, or a window below 1.
        """
        cu = boundaries(cu_seqlens, "cu_seqlens")
        if window is not None and window < 1:
            raise ValueError(f"a window holds at least the query's own token, not {window}")
        position_T = torch.arange(int(cu[-1]))
        first_T = torch.repeat_interleave(cu[:-1], cu.diff())
        if window is not None:
            first_T = torch.maximum(first_T, position_T - (window - 1))
        return cls(first_T, position_T + 1, tuple(cu.tolist()), window)

    def rows(self, index_T: Tensor) -> Reach:
        """The reach of the queries `index_T`, in that order, which remembers the one of all.

        Args:
            index_T: Numbers of rows of this reach, int64 on the host.
        """
        if len(index_T) == len(self) and bool((index_T == torch.arange(len(self))).all()):
            return self
        of_T = index_T if self.index_T is None else self.index_T[index_T]
        first_T, last_T = self.first_T[index_T], self.last_T[index_T]
        return Reach(first_T, last_T, whole=self.of_all, index_T=of_T)

    def keys(self, index_S: Tensor) -> Reach:
        """The same queries over local keys only; these number otherwise than those of `of_all`.

        Args:
            index_S: Positions of the local keys, strictly ascending, int64 [S] on the host.
        """
        size = len(index_S)
        leading = size > 0 and int(index_S[0]) == 0 and int(index_S[-1]) == size - 1
        if self.empty or (leading and int(self.last_T.max()) <= size):
            # Other rows may see more than these keys.
            return self if self.whole is None else Reach(self.first_T, self.last_T)
        # Contiguous: searchsorted copies strided bounds and warns about it.
        first_T = torch.searchsorted(index_S, self.first_T.contiguous())
        return Reach(first_T, torch.searchsorted(index_S, self.last_T.contiguous()))

    def __len__(self) -> int:
        return len(self.first_T)

    @property
    def of_all(self) -> Reach:
        """The reach of all rows of the sequence, which exchanges plan with for every rank."""
        return self if self.whole is None else self.whole

    @cached_property
    def empty(self) -> bool:
        """Whether no row sees anything."""
        return not bool((self.first_T < self.last_T).any())

    @cached_property
    def stop(self) -> int:
        """One past the last key that any row sees."""
        return 0 if self.empty else int(self.last_T[self.first_T < self.last_T].max())

    @cached_property
    def span(self) -> tuple[int, int]:
        """The smallest range of rows that holds every row that sees something."""
        seeing = (self.first_T < self.last_T).nonzero()[:, 0]
        return (int(seeing[0]), int(seeing[-1]) + 1) if len(seeing) else (0, 0)

    def area(self) -> int:
        """Number of visible (query, key) pairs."""
        return self._area

    @cached_property
    def _area(self) -> int:
        return int((self.last_T - self.first_T).clamp(min=0).sum())

    @cached_property
    def first(self) -> Mirror:
        """`first_T` as int32 on other devices."""
        return Mirror(self.first_T)

    @cached_property
    def last(self) -> Mirror:
        """`last_T` as int32 on other devices."""
        return Mirror(self.last_T)

    @cached_property
    def pieces(self) -> tuple[RowGroup, ...]:
        """Rectangles, causal squares and masked tiles that cover every visible pair once."""
        return plan_pieces(self.first_T, self.last_T)
