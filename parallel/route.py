"""Route: which shard of keys every rank computes with, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Hop(NamedTuple):
    """What one rank does with one shard between two steps.

    Attributes:
        to: The rank that it sends what it has to.
        of: The rank from which it receives.
        step: The step at which it computes with what it receives.
    """

    to: int
    of: int
    step: int


@dataclass(frozen=True)
class Route:
    """A tour of all shards over all ranks. At every step no two ranks have the same shard.

    Attributes:
        shards: For each step, the shard (by its owner) that each rank computes with.
        sent: For each step but the first, the step at which its shards were sent on: each rank
            sends the one that it then computes with.
    """

    shards: tuple[tuple[int, ...], ...]
    sent: tuple[int, ...]

    @property
    def steps(self) -> int:
        """As many as ranks."""
        return len(self.shards)

    def hops(self, rank: int, step: int) -> list[Hop]:
        """The shards that leave a rank, and those that it expects, from a step on."""
        found = []
        for use, sent in enumerate(self.sent, start=1):
            if sent == step:
                mine, wanted = self.shards[step][rank], self.shards[use][rank]
                to, of = self.shards[use].index(mine), self.shards[step].index(wanted)
                found.append(Hop(to, of, use))
        return found

    def homeward(self, rank: int, step: int) -> Hop:
        """Where the sums of a shard's gradients go after a step, and whose come.

        They follow their shard; after the last step they go to its owner.
        """
        mine, now = self.shards[step][rank], self.shards[step]
        if step + 1 == self.steps:
            return Hop(mine, now.index(rank), step + 1)
        following = self.shards[step + 1]
        return Hop(following.index(mine), now.index(following[rank]), step + 1)


def ring(ranks: int) -> Route:
    """Every shard goes from each rank to the next one."""
    shards = tuple(tuple((rank - step) % ranks for rank in range(ranks)) for step in range(ranks))
    return Route(shards, tuple(range(ranks - 1)))


def double_ring(ranks: int, inner: int) -> Route:
    """Shards go round inside of a node, and meanwhile on to the next node.

    Double-ring attention (LoongTrain, arXiv 2406.18485): what crosses nodes leaves `inner` steps
    before it is needed.

    Args:
        ranks: Context ranks, a multiple of `inner`.
        inner: Neighbouring ranks that share a node.
    """
    nodes = ranks // inner

    def shard(rank: int, step: int) -> int:
        node, place = rank // inner - step // inner, rank % inner - step % inner
        return node % nodes * inner + place % inner

    shards = tuple(tuple(shard(rank, step) for rank in range(ranks)) for step in range(ranks))
    sent = tuple(step - 1 if step % inner else step - inner for step in range(1, ranks))
    return Route(shards, sent)
