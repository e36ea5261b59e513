"""Heads: which of a layer's heads one rank attends with. Importing this needs no torch.

Shapes: H query heads, G key-value heads, Q query groups, C block heads, N blocks per choice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Share(NamedTuple):
    """Neighbouring query heads and their key-value heads, each of which has as many of them.

    Attributes:
        heads: The query heads; may be none.
        groups: Their key-value heads; none where there are no query heads.
    """

    heads: slice
    groups: slice

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """First and one past the last of both."""
        return self.heads.start, self.heads.stop, self.groups.start, self.groups.stop

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of query heads and of key-value heads."""
        return self.heads.stop - self.heads.start, self.groups.stop - self.groups.start


def split_heads(heads: int, groups: int, ranks: int) -> list[Share]:
    """The heads of each rank.

    Where there are key-value heads enough, every rank has whole ones, as many as the others or one
    more. Otherwise several ranks have the same one, and divide its query heads; ranks beyond the
    query heads have nothing to do.

    Args:
        heads: Query heads, a multiple of `groups`.
        groups: Key-value heads.
        ranks: Ranks.
    """
    per_group = heads // groups
    if ranks <= groups:
        bounds = [groups * rank // ranks for rank in range(ranks + 1)]
        return [
            Share(slice(first * per_group, last * per_group), slice(first, last))
            for first, last in pairwise(bounds)
        ]
    shares = []
    for group in range(groups):
        members = ranks * (group + 1) // groups - ranks * group // groups
        for member in range(members):
            first, last = (per_group * n // members for n in (member, member + 1))
            served = slice(group, group + (first < last))
            shares.append(Share(slice(group * per_group + first, group * per_group + last), served))
    return shares


def of_share(ids_QCN: Tensor, share: Share, heads: int, groups: int) -> Tensor:
    """The choices of some heads.

    Args:
        ids_QCN: Those of all heads. A block head chooses for all of them, for some key-value heads
            or for one, or for some query heads or for one.
        share: The heads.
        heads: All query heads.
        groups: All key-value heads.
    """
    import torch

    choosers = ids_QCN.shape[1]
    if choosers == 1:
        return ids_QCN
    of_groups = choosers <= groups
    every, own = (groups, share.groups) if of_groups else (heads, share.heads)
    if choosers == every:
        return ids_QCN[:, own]
    served = torch.arange(own.start, own.stop, device=ids_QCN.device)
    return ids_QCN.index_select(1, served * choosers // every)
