"""Transports: how tensors move between the context ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 renamed both, and warns about the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Handle(Protocol):
    """A transfer under way."""

    def wait(self) -> list[Tensor]:
        """The received tensors; the sent ones may be written again from here on."""
        ...


class Transport(Protocol):
    """What an exchange needs of the network; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This rank's number among the context ranks."""
        ...

    @property
    def size(self) -> int:
        """Context ranks."""
        ...

    def shift(self, tensors: Sequence[Tensor]) -> Handle:
        """Starts to send to the next rank and to receive the same shapes from the previous one."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, stacked: [size, ...]."""
        ...

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of their `tensor[rank]`, in the tensor's dtype."""
        ...


@dataclass(frozen=True)
class _Shift:
    requests: list[dist.Work]
    received: list[Tensor]
    # Not read, but they must live until they are sent.
    sent: list[Tensor]

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
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

    def shift(self, tensors: Sequence[Tensor]) -> Handle:
        """See `Transport`."""
        sent = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in sent]
        following, previous = self._peer(self.rank + 1), self._peer(self.rank - 1)
        steps: list[dist.P2POp] = []
        for out, into in zip(sent, received, strict=True):
            steps.append(dist.P2POp(dist.isend, out, following, self.group))
            steps.append(dist.P2POp(dist.irecv, into, previous, self.group))
        return _Shift(dist.batch_isend_irecv(steps), received, sent)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See `Transport`."""
        flat = tensor.reshape(-1)
        gathered = flat.new_empty(self.size * flat.numel())
        _all_gather(gathered, flat, group=self.group)
        return gathered.view(self.size, *tensor.shape)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """See `Transport`."""
        tensor = tensor.contiguous()
        if self.sums_locally:
            received = torch.empty_like(tensor)
            dist.all_to_all_single(received, tensor, group=self.group)
            return received.sum(dim=0)
        reduced = torch.empty_like(tensor[0])
        _reduce_scatter(reduced, tensor, group=self.group)
        return reduced

    def _peer(self, rank: int) -> int:
        """The global rank of a context rank."""
        rank %= self.size
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
