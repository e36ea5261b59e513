"""Transports: how tensors move between the context ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed both, and warns about the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Outgoing(NamedTuple):
    """What one other rank is to have.

    Attributes:
        peer: The context rank that it goes to.
        rows: The tensor, [n, ...].
    """

    peer: int
    rows: Tensor


class Incoming(NamedTuple):
    """What comes from one other rank.

    Attributes:
        peer: The context rank that it comes from.
        length: Its rows, n.
        like: A tensor [any, ...] whose other dimensions, dtype and device it has.
    """

    peer: int
    length: int
    like: Tensor


class Handle(Protocol):
    """A transfer under way."""

    def wait(self) -> list[Tensor]:
        """The received tensors; the sent ones may be written again from here on."""
        ...


class Transport(Protocol):
    """What an exchange needs of the network.

    Of messages both ends know; what is collective all ranks call in the same order.
    """

    @property
    def rank(self) -> int:
        """This rank's number among the context ranks."""
        ...

    @property
    def size(self) -> int:
        """Context ranks."""
        ...

    def trade(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> Handle:
        """Starts to send and to receive; what comes is in the order of `receives`.

        Between two ranks messages keep their order, and both know of each. What has no numbers is
        not sent.
        """
        ...

    def all_gather(self, tensor: Tensor) -> Handle:
        """Starts to gather every rank's tensor of the same shape; comes as one, [size, ...]."""
        ...

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """Starts to sum `tensor[rank]` over ranks, in the tensor's dtype; comes as one."""
        ...


@dataclass
class Underway:
    """Requests, and the tensors that are there when all of them are done."""

    requests: Sequence[dist.Work | None]
    received: list[Tensor]
    # Not read, but they must live until they are sent.
    sent: list[Tensor] = field(default_factory=list)

    def wait(self) -> list[Tensor]:
        """See `Handle`."""
        for request in self.requests:
            if request is not None:
                request.wait()
        self.sent.clear()
        return self.received


class DistributedTransport:
    """Ranks of a torch.distributed process group, with nccl or gloo.

    Args:
        group: The context-parallel group; None for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # Gloo reduces on the host and has no reduce-scatter in every supported release.
        self.sums_locally = dist.get_backend(group) == "gloo"
        if not self.sums_locally:
            # The first call makes nccl's communicator, and may then not be some ranks' alone.
            dist.barrier(group, device_ids=[torch.cuda.current_device()])

    def trade(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> Handle:
        """See `Transport`."""
        sent = [outgoing.rows.contiguous() for outgoing in sends]
        received = [like.new_empty(length, *like.shape[1:]) for _, length, like in receives]
        steps: list[dist.P2POp] = []
        for tensor, outgoing in zip(sent, sends, strict=True):
            if tensor.numel():
                steps.append(dist.P2POp(dist.isend, tensor, self._peer(outgoing.peer), self.group))
        for tensor, incoming in zip(received, receives, strict=True):
            if tensor.numel():
                steps.append(dist.P2POp(dist.irecv, tensor, self._peer(incoming.peer), self.group))
        return Underway(dist.batch_isend_irecv(steps) if steps else [], received, sent)

    def all_gather(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        flat = tensor.reshape(-1)
        gathered = flat.new_empty(self.size * flat.numel())
        request = _all_gather(gathered, flat, group=self.group, async_op=True)
        return Underway([request], [gathered.view(self.size, *tensor.shape)], [flat])

    def reduce_scatter(self, tensor: Tensor) -> Handle:
        """See `Transport`."""
        tensor = tensor.contiguous()
        if self.sums_locally:
            received = torch.empty_like(tensor)
            request = dist.all_to_all_single(received, tensor, group=self.group, async_op=True)
            return _LocalSum([request], [received], [tensor])
        reduced = torch.empty_like(tensor[0])
        request = _reduce_scatter(reduced, tensor, group=self.group, async_op=True)
        return Underway([request], [reduced], [tensor])

    def _peer(self, rank: int) -> int:
        """The global rank of a context rank."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _LocalSum(Underway):
    """Every rank's part of a sum."""

    def wait(self) -> list[Tensor]:
        return [super().wait()[0].sum(dim=0)]
