"""Volume: how many bytes an exchange makes each rank send, in closed form. No torch.

P context ranks of s tokens each, n numbers of a token (G key-value heads of D + V), b bytes of a
number, g bytes of its gradient: gradients travel in the dtype of the accumulators.
"""

from __future__ import annotations

from typing import NamedTuple

from .settings import ParallelSettings


class Volume(NamedTuple):
    """Bytes that a rank sends for one call of attention.

    Attributes:
        forward: On the way to the output.
        backward: On the way back.
    """

    forward: int
    backward: int


def volume_of(
    parallel: ParallelSettings, tokens: int, numbers: int, wire: int, accumulator: int = 4
) -> Volume:
    """Of one call through the exchange of the settings.

    A ring passes keys and values on P - 1 times, there and back, and their gradients P times, as
    they have to come home. An all-gather sends them to all others, again in the backward, and
    sums the gradients with one reduce-scatter.

    Args:
        parallel: The ranks and the exchange.
        tokens: Of a rank, s.
        numbers: Keys and values of a token, n.
        wire: Bytes of a number, b.
        accumulator: Bytes of a gradient, g.
    """
    ranks, keys = parallel.context, tokens * numbers
    if ranks == 1:
        return Volume(0, 0)
    there = (ranks - 1) * keys * wire
    hops = ranks if parallel.exchange == "ring" else ranks - 1
    return Volume(there, there + hops * keys * accumulator)


def volume_of_gathering(
    ranks: int, tokens: int, numbers: int, wire: int, accumulator: int = 4, *, learns: bool
) -> Volume:
    """Of making every rank's tokens known to all ranks.

    Args:
        ranks: Context ranks, P.
        tokens: Of a rank, s.
        numbers: Of a token, n.
        wire: Bytes of a number, b.
        accumulator: Bytes of a gradient, g.
        learns: Whether gradients come back.
    """
    there = (ranks - 1) * tokens * numbers
    return Volume(there * wire, there * accumulator if learns else 0)
