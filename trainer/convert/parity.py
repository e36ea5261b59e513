"""Whether two models say the same: logits at every position, and a greedy continuation.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Tokens [T] to logits [T, V]."""

_BUCKETS = 8

TEXT = """\
A library keeps more than books. It keeps the order in which they were bought, the notes of those
who read them first, and the gaps where one was lent and never came back. Somebody who looks for a
single sentence walks past all of it, and has to remember, at the last shelf, what was asked at the
door. That is what a long context is for: the question stands at the beginning, the answer near the
end, and between them lies everything that must be read and need not be repeated.

def shelf(books, width):
    rows, row = [], []
    for book in books:
        if sum(other.width for other in row) + book.width > width:
            rows.append(row)
            row = []
        row.append(book)
    return [*rows, row] if row else rows

There were 1,024 volumes in the first room, 4,096 in the second and 65,536 in the cellar, which
nobody had counted since 1887. The catalogue said otherwise. Both were right: it listed works, and
the shelves held copies.
"""
"""What is compared where no text is given: prose, code and numbers."""


@dataclass(frozen=True)
class Parity:
    """How far two models are apart.

    Attributes:
        tokens: Tokens compared.
        largest: Largest absolute difference of two logits.
        position: Where it is, and of which token's logit.
        token: The token whose logit differs most.
        scale: Largest absolute logit.
        by_position: (first, last, largest difference) over spans of positions.
        agreed: Greedy tokens that agree from the start.
        continued: Greedy tokens compared.
    """

    tokens: int
    largest: float
    position: int
    token: int
    scale: float
    by_position: tuple[tuple[int, int, float], ...]
    agreed: int
    continued: int

    def holds(self, tolerance: float) -> bool:
        """Whether all logits agree to `tolerance` of the largest one, and all greedy tokens."""
        return self.largest <= tolerance * max(1.0, self.scale) and self.agreed == self.continued


def compare(ours: Logits, theirs: Logits, tokens_T: Tensor, continued: int) -> Parity:
    """Compare two models on a text and on what they write after it.

    Args:
        ours: One model.
        theirs: The other.
        tokens_T: The text, int64.
        continued: Tokens that each model adds greedily.
    """
    with torch.no_grad():
        a_TV, b_TV = ours(tokens_T).float(), theirs(tokens_T).float()
        difference_TV = (a_TV - b_TV).abs()
        largest_T, token_T = difference_TV.max(dim=1)
        position = int(largest_T.argmax())
        written = [_continue(model, tokens_T, continued) for model in (ours, theirs)]
    same = [one == other for one, other in zip(*written, strict=True)]
    agreed = same.index(False) if False in same else continued
    count = len(tokens_T)
    edges = sorted({count * part // _BUCKETS for part in range(_BUCKETS + 1)})
    return Parity(
        tokens=count,
        largest=float(largest_T[position]),
        position=position,
        token=int(token_T[position]),
        scale=float(b_TV.abs().max()),
        by_position=tuple(
            (first, last, float(largest_T[first:last].max()))
            for first, last in itertools.pairwise(edges)
        ),
        agreed=agreed,
        continued=continued,
    )


def report(parity: Parity, tolerance: float) -> list[str]:
    """Lines that say how far apart the models are, and where."""
    lines = [f"logits over {parity.tokens} tokens, largest difference by position:"]
    lines += [
        f"  {first:,} to {last - 1:,}: {largest:.2e}" for first, last, largest in parity.by_position
    ]
    lines.append(
        f"largest: {parity.largest:.2e} at position {parity.position}, token {parity.token} "
        f"(logits up to {parity.scale:.3g})"
    )
    lines.append(f"greedy continuation: {parity.agreed} of {parity.continued} tokens agree")
    verdict = "equal" if parity.holds(tolerance) else "NOT equal"
    lines.append(f"the models are {verdict} to {tolerance:g} of the largest logit")
    return lines


def _continue(model: Logits, tokens_T: Tensor, count: int) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        all_T = torch.cat([tokens_T, torch.tensor(written, dtype=torch.int64)])
        written.append(int(model(all_T)[-1].argmax()))
    return written
