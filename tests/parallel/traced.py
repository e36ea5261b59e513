"""One call of an exchange on one rank, and what it sent; spawned processes import it by name."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import Layout, make_layout
from longspan.parallel.ranges import Needs
from longspan.parallel.simulation import simulate
from longspan.parallel.traffic import CountedTransport, Message, Traffic
from longspan.parallel.transport import DistributedTransport
from longspan.parallel.volume import Call

SCALE, BLOCK, CHOICES = 0.4, 4, 3
HOW = {
    "ring": {},
    "double_ring": {"inner": 2},
    "all_gather": {},
    "fetch": {},
    "ulysses": {},
    "two_d": {"inner": 2, "across": "ring"},
}
BYTES = {torch.bfloat16: (2, 4), torch.float32: (4, 4), torch.float64: (8, 8)}


class Trace(NamedTuple):
    """Messages in the order in which they were sent."""

    forward: tuple[Message, ...]
    backward: tuple[Message, ...]

    @property
    def volume(self):
        """Bytes of both."""
        return tuple(sum(message.size for message in messages) for messages in self)


@dataclass(frozen=True)
class Work:
    """What all ranks work on together."""

    layout: Layout
    cu: tuple[int, ...]
    groups: int = 2
    dtype: torch.dtype = torch.float32
    choosers: int = 0
    learns_lse: bool = False
    heads: int = 8
    dim: int = 6
    value_dim: int = 4
    window: int | None = None

    @property
    def reach(self):
        """Causal inside the documents."""
        return Reach.documents(self.cu, self.window)

    @property
    def needs(self):
        """Tokens that each rank needs of each owner."""
        return Needs(self.reach, self.layout).counts().tolist()

    @property
    def call(self):
        """For the closed forms."""
        shape = self.heads, self.groups, self.dim, self.value_dim
        choices = CHOICES if self.choosers else 0
        return Call(*shape, *BYTES[self.dtype], self.choosers, choices, self.learns_lse)

    def blocks(self, index):
        """What the rows of a rank chose."""
        if not self.choosers:
            return None
        grid = Grid.documents(self.cu, BLOCK)
        return Blocks.choose(torch.zeros(len(index), self.choosers, CHOICES).int(), grid)

    def start(self, transport, kind, how):
        """Attends on one rank; what it returns goes back and gives the gradients."""
        index = self.layout.index(transport.rank)
        shapes = [(self.heads, self.dim), (self.groups, self.dim), (self.groups, self.value_dim)]
        inputs = [torch.ones(len(index), *x, dtype=self.dtype).requires_grad_() for x in shapes]
        exchange = make_exchange(kind, self.layout, transport, **how)
        reach, blocks = self.reach.rows(index), self.blocks(index)
        outputs = exchange.attend(*inputs, reach, blocks, scale=SCALE)[: 1 + self.learns_lse]
        return lambda: torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])


def work(length=96, ranks=4, layout="zigzag", **fields):
    """One document, or those of `cu`."""
    return Work(make_layout(layout, length, ranks), fields.pop("cu", (0, length)), **fields)


def trace(transport, kind, how, given):
    """What one rank sends."""
    traffic = Traffic()
    back = given.start(CountedTransport(transport, traffic), kind, how)
    forward = tuple(traffic.messages)
    traffic.take()
    back()
    return Trace(forward, tuple(traffic.messages))


def traces(kind, how, given):
    """What each simulated rank sends."""
    return simulate(given.layout.ranks, lambda transport: trace(transport, kind, how, given))


def gloo_trace(kind, how, given):
    """What one real rank sends."""
    return trace(DistributedTransport(), kind, how, given)
