"""Sharding: which far blocks each head sees in S2-Attention. Importing this needs no torch."""

from __future__ import annotations


def residue(head: int, heads: int, stride: int) -> int:
    """The far blocks b that a head sees: those of its document with b % stride of this value.

    From (b + head * step + 1) % stride == 0 with step = max(1, stride // heads) (S2-Attention,
    arXiv 2407.17678, as in Phi-3-small).

    Args:
        head: Counted over the whole layer; by its number on one rank, heads of several ranks
            would see the same blocks and leave others to nobody.
        heads: Of the whole layer.
        stride: Of the far blocks a head sees one in so many.
    """
    return -(head * max(1, stride // heads) + 1) % stride


def covered(heads: int, stride: int) -> int:
    """How many of `stride` neighbouring far blocks some head sees; all, if heads are enough."""
    return len({residue(head, heads, stride) for head in range(heads)})
