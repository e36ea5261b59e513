"""Shares: documents divided among ranks so that all have equal work, and tokens as they fit.

Ranks are filled one after the other. Each takes the end of a long document, whole documents of
middle length, and then the least dense tokens that are left, so that both sums come out. Of what
is left the mean stays the same, so a way to fill the next rank remains: between its tokens from
the least dense documents (too little work) and from the densest (too much) lies the right mix.
A document without its end is a shorter document: its keys do not depend on its end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain

Part = tuple[int, int, int]
"""Document, and the half-open range of its tokens."""

SLACK = 0.02
"""A rank may have this share of the mean more or less work where that spares a cut."""

EASY = 0.9
"""Ranks that are at most so full leave one that has work enough without more tokens."""

NEAR = 0.25
"""A cut is found when it is this near, as a share of the slack."""


class Stock:
    """The tokens that no rank has yet: of each document one range.

    Args:
        lengths: Tokens of the documents.
        work: Of the first n tokens of a document.
    """

    def __init__(self, lengths: Sequence[int], work: Callable[[int], float]) -> None:
        self.up_to = cache(work)
        self.first, self.last = [0] * len(lengths), list(lengths)
        self.size, self.load = list(lengths), [self.up_to(n) for n in lengths]
        # By work per token.
        self.order = sorted((self.load[d] / n, d) for d, n in enumerate(lengths) if n)
        self.tokens, self.work = sum(lengths), sum(self.load)

    def head(self, document: int, tokens: int) -> float:
        """Work of the first of them."""
        first = self.first[document]
        return self.up_to(first + tokens) - self.up_to(first)

    def tail(self, document: int, tokens: int) -> float:
        """Work of the last of them."""
        last = self.last[document]
        return self.up_to(last) - self.up_to(last - tokens)

    def within(self, document: int, work: float, near: float) -> int:
        """How many of the first of them make up so much work, or up to `near` more."""
        low, high, below, above = 0, self.size[document], 0.0, self.load[document]
        straight, up_to, first = True, self.up_to, self.first[document]
        before = up_to(first)
        while high - low > 1 and above > work + near:
            # Work grows nearly linearly with tokens, but not everywhere: halving always ends.
            share = 0.5
            if straight and above > below:
                share = (work + near / 2 - below) / (above - below)
            middle = min(max(low + int(share * (high - low)) + 1, low + 1), high - 1)
            found = up_to(first + middle) - before
            if found < work:
                low, below = middle, found
            else:
                high, above = middle, found
            straight = not straight
        return high

    def take(self, document: int, head: int = 0, tail: int = 0) -> list[Part]:
        """Takes so many of the first and last tokens of a document away."""
        first, last = self.first[document], self.last[document]
        before, size = self.load[document], self.size[document]
        del self.order[bisect_left(self.order, (before / size, document))]
        left = size - head - tail
        self.tokens -= head + tail
        if not left:
            self.size[document] = self.load[document] = 0
            self.work -= before
            return [(document, first, last)]
        after = self.up_to(last - tail) - self.up_to(first + head)
        insort(self.order, (after / left, document))
        self.first[document], self.last[document] = first + head, last - tail
        self.size[document], self.load[document] = left, after
        self.work -= before - after
        parts = [(document, first, first + head)] if head else []
        return [*parts, (document, last - tail, last)] if tail else parts


class Filling:
    """Documents in the order in which they fill up a rank.

    Args:
        stock: What is left.
        documents: In that order.
        tokens: How many are needed; no documents beyond them.
    """

    def __init__(self, stock: Stock, documents: Iterable[int], tokens: int) -> None:
        self.stock, self.documents = stock, list[int]()
        self._tokens, self._work = [0], [0.0]
        have, load, sizes, loads = 0, 0.0, stock.size, stock.load
        named, sums, works = self.documents.append, self._tokens.append, self._work.append
        for document in documents:
            if have >= tokens:
                break
            have += sizes[document]
            load += loads[document]
            named(document)
            sums(have)
            works(load)

    def work(self, tokens: int) -> float:
        """Of the first so many tokens."""
        whole = bisect_right(self._tokens, tokens) - 1
        rest = tokens - self._tokens[whole]
        if not rest or whole == len(self.documents):
            return self._work[whole]
        return self._work[whole] + self.stock.head(self.documents[whole], rest)


class Rank:
    """One rank while it is filled.

    Args:
        stock: What is left; what this rank takes leaves it.
        room: Tokens that fit.
        later: Tokens that fit on the later ranks.
        left: Ranks that are left, this one among them.
        mean: Work of all ranks at first, by their number.
    """

    def __init__(self, stock: Stock, room: int, later: int, left: int, mean: float) -> None:
        self.stock, self.room, self.later = stock, room, later
        self.least = max(0, stock.tokens - later)
        self.work = stock.work / left
        self.over = SLACK * mean
        # Less where earlier ranks did too little, or that adds up in the last ones.
        self.under = min(max(mean + self.over - self.work, 0.0), self.over)
        self.tokens = min(room, max(self.least, -(-stock.tokens // left)))
        self.parts: list[Part] = []

    def fill(self, begun: int) -> int:
        """Takes its parts.

        Args:
            begun: The document of which the rank before took the end; -1 for none.

        Returns:
            The document of which this one took the end, and the next should; -1 for none.
        """
        stock = self.stock
        while stock.order and self.tokens > 0:
            filling = Filling(stock, self._sparsest(), self.tokens)
            lacking = self.work - filling.work(self.tokens)
            if lacking <= self.under:
                self._fill_up(filling)
                break
            document, whole = self._next(begun, filling, lacking)
            if whole:
                self._take(document, head=stock.size[document])
                begun = -1
                continue
            enough = self._cut(document, filling)
            begun = document if stock.size[document] else -1
            if enough:
                break
        return begun if begun >= 0 and stock.size[begun] else -1

    def _next(self, begun: int, filling: Filling, lacking: float) -> tuple[int, bool]:
        """A document that has work enough for this rank, and whether to take all of it."""
        order = self.stock.order
        if begun >= 0 and self._suffices(begun):
            return begun, False
        densest = order[-1][1]
        if not self.parts and not self._fits(densest, filling, lacking):
            return densest, False
        at = self._largest(filling, lacking)
        if at >= len(filling.documents) - 1 and self._fits(order[at][1], filling, lacking):
            return order[at][1], True
        return densest, False

    def _gain(self, document: int, filling: Filling) -> float:
        """Work that the rank gains if it takes a document instead of what would fill it up."""
        left = self.tokens - self.stock.size[document]
        return self.stock.load[document] + filling.work(left) - filling.work(self.tokens)

    def _fits(self, document: int, filling: Filling, lacking: float) -> bool:
        """Whether the whole document leaves the rank neither too much work nor too little."""
        size = self.stock.size[document]
        if size > self.tokens or self._gain(document, filling) > lacking + self.over:
            return False
        dense = self.stock.load[document] + self._densest(self.tokens - size, document)
        return dense >= self.work - self.under

    def _suffices(self, document: int) -> bool:
        """Whether the end of a document can be work enough."""
        size = min(self.stock.size[document], self.tokens)
        dense = self.stock.tail(document, size) + self._densest(self.tokens - size, document)
        return dense >= self.work

    def _densest(self, tokens: int, without: int) -> float:
        """Work of so many of the densest tokens."""
        work = 0.0
        for _, document in reversed(self.stock.order):
            if tokens <= 0:
                break
            if document != without:
                size = min(tokens, self.stock.size[document])
                work += self.stock.tail(document, size)
                tokens -= size
        return work

    def _largest(self, filling: Filling, lacking: float) -> int:
        """Where in the order the densest document is that fits, behind those that fill it up."""
        order = self.stock.order
        low, high = len(filling.documents) - 2, len(order) - 1
        while low < high:
            middle = (low + high + 1) // 2
            document = order[middle][1]
            small = self.stock.size[document] <= self.tokens
            if small and self._gain(document, filling) <= lacking + self.over:
                low = middle
            else:
                high = middle - 1
        return low

    def _take(self, document: int, head: int = 0, tail: int = 0) -> None:
        stock, taken = self.stock, head + tail
        before = stock.work
        self.parts += stock.take(document, head, tail)
        self.tokens -= taken
        self.room -= taken
        self.least -= taken
        self.work -= before - stock.work

    def _sparsest(self, last: int = -1) -> Iterator[int]:
        """Documents by work per token, one of them last."""
        if last < 0:
            return (document for _, document in self.stock.order)
        others = (document for _, document in self.stock.order if document != last)
        return chain(others, [last])

    def _cut(self, document: int, filling: Filling) -> bool:
        """Takes the end of a document, and fills up with others or with its own beginning.

        Returns:
            Whether it was enough; if not, all of it is taken and nothing else.
        """
        stock, tokens, size = self.stock, self.tokens, self.stock.size[document]
        if document in filling.documents:
            filling = Filling(stock, self._sparsest(document), tokens)
        alone = self._alone(document)
        if alone:
            self._take(document, tail=alone)
            return self.work <= self.under
        # Its own tokens need no keys from elsewhere; others do where they are cut as well.
        cut = stock.size[filling.documents[-1]] > tokens
        if cut and size >= tokens and stock.head(document, tokens) <= self.work:
            filling = Filling(stock, [document], tokens)
        tail = self._tail(document, filling)
        work = stock.tail(document, tail) + filling.work(tokens - tail)
        enough = tail < size or work >= self.work - self.under
        self._take(document, tail=tail)
        if enough:
            self._fill_up(filling)
        return enough

    def _alone(self, document: int) -> int:
        """Tokens of a document's end that are to be filled up only as far as there is no room.

        Then others do without this rank. 0 where ranks are too full for that to spare cuts.
        """
        stock, size = self.stock, self.stock.size[document]
        if stock.tokens - self.tokens > EASY * self.later:
            return 0
        if stock.load[document] > self.work + self.over:
            tail = self._tail(document, Filling(stock, [], 0))
            dense = stock.tail(document, tail)
        else:
            tail, dense = size, stock.load[document] + self._densest(self.tokens - size, document)
        easy = stock.tokens - tail <= EASY * self.later
        fits = tail <= self.tokens and dense >= self.work - self.under
        return tail if easy and fits else 0

    def _tail(self, document: int, filling: Filling) -> int:
        """How many tokens of a document's end make up the work, or as many as there are."""
        wanted, tokens, fill = self.work, self.tokens, filling.work
        up_to, last = self.stock.up_to, self.stock.last[document]
        low, high = 0, min(self.stock.size[document], tokens)
        whole, below = up_to(last), fill(tokens)
        above = whole - up_to(last - high) + fill(tokens - high)
        near, straight = NEAR * self.over, True
        while high - low > 1 and above > wanted + near:
            # Work grows nearly linearly with tokens, but not everywhere: halving always ends.
            share = 0.5
            if straight and above > below:
                share = (wanted + near / 2 - below) / (above - below)
            middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
            work = whole - up_to(last - middle) + fill(tokens - middle)
            if work < wanted:
                low, below = middle, work
            else:
                high, above = middle, work
            straight = not straight
        return high

    def _fill_up(self, filling: Filling) -> None:
        """Takes documents in this order, the last one in part only where it must."""
        stock = self.stock
        for document in filling.documents:
            if self.tokens <= 0:
                return
            size, must = stock.size[document], self.least > 0
            if not size:
                continue
            heavy = stock.load[document] > self.work + self.over
            if not must and (heavy or size > self.tokens) and self.work <= self.under:
                return
            if size > self.room or (size > self.tokens and heavy):
                size = self.tokens
            if not must and heavy:
                size = min(size, stock.within(document, self.work, NEAR * self.over))
            self._take(document, head=size)


def share(
    lengths: Sequence[int], work: Callable[[int], float], rooms: Sequence[int]
) -> list[list[Part]]:
    """Divides documents among ranks.

    Args:
        lengths: Tokens of each document; none is possible.
        work: Of the first n tokens of a document, not decreasing.
        rooms: Tokens that fit on each rank, together enough for all.

    Returns:
        The parts of each rank. All have about equal work; if all rooms are needed they are full.
    """
    stock = Stock(lengths, work)
    mean, begun = stock.work / len(rooms), -1
    shares: list[list[Part]] = []
    later = sum(rooms)
    for number, room in enumerate(rooms):
        later -= room
        rank = Rank(stock, room, later, len(rooms) - number, mean)
        begun = rank.fill(begun)
        shares.append(rank.parts)
    return shares
