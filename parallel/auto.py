"""Auto: which exchange will be the fastest, from bytes, pairs and wires. No torch.

An estimate to choose by, not a promise: rates, overlap and what is fetched are assumed; other bytes
are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .heads import split_heads
from .volume import Call, volume_of

if TYPE_CHECKING:
    from .exchange import ExchangeKind


@dataclass(frozen=True)
class Wires:
    """What ranks and the wires between them are good for.

    Attributes:
        inside: Bytes per second that a rank sends to others of its node.
        outside: The same to other nodes.
        latency: Seconds that a message takes beside its bytes.
        flops: Products per second of a rank in attention.
    """

    inside: float
    outside: float
    latency: float
    flops: float


GPU = Wires(inside=270e9, outside=30e9, latency=20e-6, flops=400e12)
"""60% of NVLink's 450 GB/s and of a 400 Gb/s card, and of what dense attention reaches on H100s."""

CPU = Wires(inside=2e9, outside=1e9, latency=100e-6, flops=40e9)
"""Processes of one machine over gloo, and a core or two each."""


@dataclass(frozen=True)
class Work:
    """A layer's attention over one micro-batch.

    Attributes:
        sizes: Tokens of each context rank.
        call: What travels.
        pairs: Visible (query, key) pairs of the mean rank, over its query heads.
        busiest: Of the parts that the tokens are in, by their number, the busiest one's pairs over
            the mean one's.
        reached: The share of the other ranks' keys that some query of a rank reaches.
        cutting: How much longer attention takes where its keys come in many parts.
        sorting: How much longer it takes for each further part, as choices are sorted for it.
    """

    sizes: Sequence[int]
    call: Call
    pairs: float
    busiest: Callable[[int], float]
    reached: float
    cutting: float
    sorting: float = 0.0


class Candidate(NamedTuple):
    """An exchange and its ranks of a node.

    Attributes:
        kind: See `make_exchange`.
        inner: Neighbouring ranks that share a node; 1 where they do not matter.
    """

    kind: ExchangeKind
    inner: int = 1


class Prediction(NamedTuple):
    """What an exchange is thought to take.

    Attributes:
        candidate: The exchange.
        seconds: Of forward and backward of one layer.
        waiting: Of them without computing.
    """

    candidate: Candidate
    seconds: float
    waiting: float


def predict(work: Work, node: int, wires: Wires) -> list[Prediction]:
    """All exchanges that can do the work, the fastest first; of equally fast ones what sends less.

    Args:
        work: The layer.
        node: Context ranks of a node.
        wires: Between them.
    """
    found = [_predict(candidate, work, node, wires) for candidate in _candidates(work, node)]
    return sorted(found, key=lambda prediction: prediction.seconds)


def _candidates(work: Work, node: int) -> Iterator[Candidate]:
    ranks, heads = len(work.sizes), work.call.heads
    yield Candidate("all_gather")
    yield Candidate("fetch")
    yield Candidate("ring")
    if ranks <= heads:
        yield Candidate("ulysses")
    if 1 < node < ranks and ranks % node == 0:
        yield Candidate("double_ring", node)
        if node <= heads:
            yield Candidate("two_d", node)


def _predict(candidate: Candidate, work: Work, node: int, wires: Wires) -> Prediction:
    kind, inner = candidate
    ranks, call = len(work.sizes), work.call
    parts = {"all_gather": 1, "ulysses": 1, "two_d": ranks // inner}.get(kind, ranks)
    team = {"ulysses": ranks, "two_d": inner}.get(kind, 1)
    shares = split_heads(call.heads, call.groups, team)
    widest = max(share.widths[0] for share in shares) * team / call.heads
    pairs = work.pairs * work.busiest(ranks // team) * widest
    products = 3.5 * 2 * pairs * (call.dim + call.value_dim)
    slower = 1 + work.cutting * (1 - 1 / parts) + work.sorting * (parts - 1)
    computing = products / wires.flops * slower
    # The part that is there at once, or that comes first, hides nothing and is not hidden.
    hidden = computing * (parts - 1) / parts
    leaves = ranks > node
    wire = wires.outside if leaves else wires.inside
    sent = _bytes(candidate, work)
    messages = 3 * ranks * wires.latency
    if kind == "ulysses":
        far = (ranks - node) / (ranks - 1) if leaves else 0.0
        waiting = sent * ((1 - far) / wires.inside + far / wires.outside)
    elif kind == "two_d":
        over_heads = _trading(work, inner)
        rest = (sent - over_heads) / wires.outside
        waiting = over_heads / wires.inside + max(rest / max(1, parts - 1), rest - hidden)
    elif kind == "all_gather":
        travelling, heads = sent / wire, call.groups
        waiting = max(travelling / heads, travelling - computing * (heads - 1) / heads)
    elif kind == "double_ring":
        # What crosses comes after the first hop inside, and is needed a round later.
        crossing = sent / ranks / wires.outside - computing / ranks
        waiting = max(0.0, sent / wires.inside - hidden) + ranks / inner * max(0.0, crossing)
    else:
        waiting = max(0.0, sent / wire - hidden)
    waiting += messages
    return Prediction(candidate, computing + waiting, waiting)


def _bytes(candidate: Candidate, work: Work) -> float:
    """What a rank sends, forward and backward."""
    kind, inner = candidate
    if kind == "fetch":
        tokens = work.reached * (sum(work.sizes) - work.sizes[0])
        call = work.call
        of_token = call.numbers * (call.wire + call.again + call.accumulator)
        return tokens * of_token
    return sum(volume_of(kind, work.sizes, 0, work.call, inner=inner))


def _trading(work: Work, inner: int) -> float:
    """What trading heads inside of a node sends."""
    return sum(volume_of("ulysses", work.sizes[:inner], 0, work.call))
