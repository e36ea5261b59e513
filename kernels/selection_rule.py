"""SelectionRule: which blocks of a grid a query chooses, given pooled keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHOICES = {
    "statistic": ("probability", "logit"),
    "heads": ("sum", "max", "none"),
    "mapping": ("overlap_sum", "overlap_max"),
}


LAST = -3.4028234663852886e38
"""Score of a block that nobody has a logit for, the lowest in fp32: after all others, but before
what is out of reach."""


@dataclass(frozen=True)
class SelectionRule:
    """A query scores pooled keys, its scores become scores of blocks, and the best are chosen.

    NSA (arXiv 2502.11089): `SelectionRule(16, initial=1, local=2)` over windows of 32 and 16 and
    blocks of 64. InfLLM-V2 (arXiv 2509.24663): `SelectionRule(63, initial=1, local=32,
    count_forced=False, mapping="overlap_max")` over the same. MoBA (arXiv 2502.13189):
    `SelectionRule(12, statistic="logit", heads="none")` over windows that are the blocks.

    Attributes:
        count: Blocks per choice.
        initial: First blocks in reach that are always chosen: the document's, without a window.
        local: Last blocks that are always chosen, up to and including the query's own.
        count_forced: Whether `count` includes those that are always chosen. If not, a choice has
            `initial` + `local` + `count` blocks.
        statistic: Of a query and a pooled key: its share of the softmax over all pooled keys that
            the query sees, or the scaled product.
        heads: How the query heads of a key-value head become one choice, and so the tokens of a
            query group; `none` for a choice per query head, which sums the tokens.
        mapping: A block's score is the sum over the windows that overlap it, weighted with the
            overlap in strides (NSA, eq. 9), or the largest of them.
    """

    count: int
    initial: int = 0
    local: int = 1
    count_forced: bool = True
    statistic: Literal["probability", "logit"] = "probability"
    heads: Literal["sum", "max", "none"] = "sum"
    mapping: Literal["overlap_sum", "overlap_max"] = "overlap_sum"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} of a selection is one of {', '.join(known)}, "
                                 f"not {getattr(self, name)!r}")  # fmt: skip
        if min(self.count, self.initial, self.local) < 0 or self.total < 1:
            raise ValueError(f"a selection chooses at least one block: {self}")
        if self.initial + self.local > self.total:
            raise ValueError(
                f"{self.initial} initial and {self.local} local blocks are more than the "
                f"{self.count} that are chosen; forced blocks count"
            )

    @property
    def total(self) -> int:
        """Blocks of a choice."""
        return self.count + (0 if self.count_forced else self.initial + self.local)
