"""Volume: how many bytes an exchange makes each rank send, in closed form. No torch.

Shapes: P context ranks, s[r] tokens of rank r, S of all; G key-value heads of D + V numbers, n of
a token; h[r] query and g[r] key-value heads of rank r where ranks divide them. A number travels as
`wire` bytes, and what is summed over ranks as `accumulator` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from .heads import Share, split_heads

if TYPE_CHECKING:
    from .exchange import Across, ExchangeKind


class Volume(NamedTuple):
    """Bytes that a rank sends for one call of attention.

    Attributes:
        forward: On the way to the output.
        backward: On the way back.
    """

    forward: int
    backward: int

    def plus(self, other: Volume) -> Volume:
        """Both."""
        return Volume(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Call:
    """What one call of attention works on.

    Attributes:
        heads: Query heads, H.
        groups: Key-value heads, G.
        dim: Numbers of a query and of a key, D.
        value_dim: Of a value, V.
        wire: Bytes of a number.
        accumulator: Bytes of a number that is accumulated: of an lse, and of gradients that are
            not complete.
        choosers: Heads that choose blocks for themselves; 0 where nothing is chosen.
        choices: Blocks that each of them chooses for a query.
        learns_lse: Whether the lse has a gradient.
        keeps: Whether the other ranks' keys and values stay there for the backward.
    """

    heads: int
    groups: int
    dim: int
    value_dim: int
    wire: int
    accumulator: int = 4
    choosers: int = 0
    choices: int = 0
    learns_lse: bool = False
    keeps: bool = False

    @property
    def numbers(self) -> int:
        """Keys and values of a token, n."""
        return self.groups * (self.dim + self.value_dim)

    @property
    def again(self) -> int:
        """Bytes of a number that travels again in the backward."""
        return 0 if self.keeps else self.wire

    def chosen(self, share: Share) -> int:
        """Bytes of the choices of a token that some heads need; block numbers are int32."""
        heads, groups = share.widths
        needed = heads if self.choosers > self.groups else groups
        return 4 * self.choices * (self.choosers if self.choosers <= 1 else needed)


def volume_of(
    kind: ExchangeKind,
    sizes: Sequence[int],
    rank: int,
    call: Call,
    *,
    inner: int = 1,
    across: Across = "ring",
    needs: Sequence[Sequence[int]] | None = None,
) -> Volume:
    """Of any exchange.

    Args:
        kind: See `make_exchange`, as for `inner` and `across`.
        sizes: Tokens of each rank.
        rank: The rank that sends.
        call: What travels.
        inner: Of `double_ring` and `two_d`: neighbouring ranks that share a node.
        across: Of `two_d`: the exchange between nodes.
        needs: Of `fetch`: see `volume_of_fetch`.
    """
    if len(sizes) == 1:
        return Volume(0, 0)
    if kind == "all_gather":
        return volume_of_all_gather(sizes, call)
    if kind == "ulysses":
        return volume_of_ulysses(sizes, rank, call)
    if kind == "two_d":
        return volume_of_two_d(sizes, rank, call, inner=inner, across=across)
    if kind == "fetch":
        assert needs is not None, "what is fetched depends on what is reached"
        return volume_of_fetch(needs, rank, call)
    return volume_of_ring(sizes, rank, call, inner=inner if kind == "double_ring" else 1)


def volume_of_all_gather(sizes: Sequence[int], call: Call) -> Volume:
    """Of an all-gather of the keys and values of each head, and of the sum of their gradients.

    Every rank sends as many rows as the largest rank has, to P - 1 others: a ring passes P - 1 of
    P equal parts on. The backward gathers again, and one reduce-scatter sums the gradients
    (all-gather attention, Llama 3, arXiv 2407.21783, section 3.3.2).

    Args:
        sizes: Tokens of each rank.
        call: What travels.
    """
    rows = (len(sizes) - 1) * max(sizes) * call.numbers
    return Volume(rows * call.wire, rows * (call.again + call.accumulator))


def volume_of_ring(sizes: Sequence[int], rank: int, call: Call, *, inner: int = 1) -> Volume:
    """Of a ring (arXiv 2310.01889), or with `inner` of a double ring (arXiv 2406.18485).

    A ring sends every shard on but that of the next rank, which is there at the last step: S -
    s[r + 1] tokens. Inside of its node a double ring does the same for the ranks of each node in
    turn, and to the next node a rank sends the shards of its own place, but not that node's. In
    the backward the gradients of all S tokens go on once each, as they have to come home: P hops
    in place of P - 1.

    Args:
        sizes: Tokens of each rank.
        rank: The rank that sends, r.
        call: What travels.
        inner: Neighbouring ranks that share a node.
    """
    if len(sizes) == 1:
        return Volume(0, 0)
    nodes, (node, place) = len(sizes) // inner, divmod(rank, inner)
    at_place = sizes[place::inner]
    within = sum(sizes) - sum(sizes[(place + 1) % inner :: inner])
    across = sum(at_place) - at_place[(node + 1) % nodes]
    there = (within + across) * call.numbers
    home = sum(sizes) * call.numbers * call.accumulator
    return Volume(there * call.wire, there * call.again + home)


def volume_of_fetch(needs: Sequence[Sequence[int]], rank: int, call: Call) -> Volume:
    """Of sending each rank the keys and values that it needs, and their gradients back.

    The backward sends them again. Then gradients of what a rank received leave it, so that their
    bytes are those of its row and not of its column.

    Args:
        needs: How many tokens each rank needs of each owner, [ranks][owners]; see `Needs.counts`.
        rank: The rank that sends.
        call: What travels.
    """
    sent = sum(row[rank] for reader, row in enumerate(needs) if reader != rank)
    received = sum(tokens for owner, tokens in enumerate(needs[rank]) if owner != rank)
    there, back = sent * call.numbers, received * call.numbers
    return Volume(there * call.wire, there * call.again + back * call.accumulator)


def volume_of_ulysses(sizes: Sequence[int], rank: int, call: Call) -> Volume:
    """Of trading tokens for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.2).

    To rank j go s[r] tokens of its h[j] query heads, of its g[j] key-value heads and of what its
    heads chose, and from the own h[r] heads s[j] tokens of output and lse. In the backward the
    output's gradient (and the lse's) goes the first way, those of queries, keys and values the
    second one. Where several ranks have the same key-value head, P > G, its gradients are parts of
    a sum and travel as accumulators. With equal sizes and P <= G each way takes
    (P - 1) / P * s * (H + G) * (D + V) numbers, and the lse.

    Args:
        sizes: Tokens of each rank that trades.
        rank: The rank that sends, r.
        call: What travels.
    """
    ranks = len(sizes)
    shares = split_heads(call.heads, call.groups, ranks)
    pair, wire, wide = call.dim + call.value_dim, call.wire, call.accumulator
    others = [share for peer, share in enumerate(shares) if peer != rank]
    query_heads = sum(share.widths[0] for share in others)
    key_heads = sum(share.widths[1] for share in others)
    forward = sizes[rank] * (
        (query_heads * call.dim + key_heads * pair) * wire + sum(map(call.chosen, others))
    )
    heads, groups = shares[rank].widths
    away = sum(sizes) - sizes[rank]
    forward += away * heads * (call.value_dim * wire + wide)
    backward = sizes[rank] * query_heads * (call.value_dim * wire + wide * call.learns_lse)
    backward += away * heads * call.dim * wire
    backward += away * groups * pair * (wide if ranks > call.groups else wire)
    return Volume(forward, backward)


def volume_of_two_d(
    sizes: Sequence[int],
    rank: int,
    call: Call,
    *,
    inner: int,
    across: Across = "ring",
) -> Volume:
    """Of Ulysses inside a node, and a ring or an all-gather of its heads over nodes (USP).

    The shards that cross nodes are of all tokens of a node and of a rank's heads alone (arXiv
    2405.07719, section 3).

    Args:
        sizes: Tokens of each rank.
        rank: The rank that sends.
        call: What travels.
        inner: Neighbouring ranks that share a node.
        across: What goes on between nodes.
    """
    node, place = divmod(rank, inner)
    traded = volume_of_ulysses(sizes[node * inner : (node + 1) * inner], place, call)
    heads, groups = split_heads(call.heads, call.groups, inner)[place].widths
    joined = [sum(sizes[first : first + inner]) for first in range(0, len(sizes), inner)]
    own = replace(call, heads=heads, groups=groups)
    if across == "all_gather":
        return traded.plus(volume_of_all_gather(joined, own))
    return traded.plus(volume_of_ring(joined, node, own))


def volume_of_gathering(
    ranks: int, tokens: int, numbers: int, wire: int, accumulator: int = 4, *, learns: bool
) -> Volume:
    """Of making every rank's tokens known to all ranks.

    Args:
        ranks: Context ranks, P.
        tokens: Of the rank that has most of them.
        numbers: Of a token.
        wire: Bytes of a number.
        accumulator: Bytes of a gradient.
        learns: Whether gradients come back.
    """
    there = (ranks - 1) * tokens * numbers
    return Volume(there * wire, there * accumulator if learns else 0)
