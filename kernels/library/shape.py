"""Shape: the reaches that library kernels serve, in their own terms.

Shapes: T query rows, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..mirror import Mirror
from ..reach import Reach
from ..request import Request


@dataclass(frozen=True, eq=False)
class Shape:
    """Sequences that attend to themselves causally, or all queries to all of some keys.

    Attributes:
        queries: Boundaries of the sequences among the query rows.
        keys: Boundaries among the keys.
        causal: Whether a query sees only the keys up to its own.
        window: Visible tokens, the query's own included; None for all.
        first: Where the keys begin that are seen at all.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    causal: bool
    window: int | None = None
    first: int = 0

    @cached_property
    def cu_queries(self) -> Mirror:
        """`queries` on a device."""
        return Mirror(torch.tensor(self.queries))

    @cached_property
    def cu_keys(self) -> Mirror:
        """`keys` on a device."""
        return Mirror(torch.tensor(self.keys))

    def longest(self, bounds: Sequence[int]) -> int:
        """Tokens in the longest sequence."""
        return max((b - a for a, b in pairwise(bounds)), default=0)

    def seen(self, x_SGD: Tensor) -> Tensor:
        """The keys or values that are seen at all."""
        return x_SGD[self.first : self.first + self.keys[-1]]


_shapes: WeakKeyDictionary[Reach, Shape | None] = WeakKeyDictionary()


def shape_of(reach: Reach) -> Shape | None:
    """The shape of a reach; None if no single call of a library kernel computes it."""
    if reach not in _shapes:
        _shapes[reach] = _find(reach)
    return _shapes[reach]


def served(reach: Reach) -> Shape:
    """The shape of a reach that `why_not` has let through."""
    shape = shape_of(reach)
    assert shape is not None, "not served"
    return shape


def seen_whole(grad: Tensor, x_SGD: Tensor, shape: Shape) -> Tensor:
    """The gradient of all keys, zero for those that nobody sees."""
    if len(grad) == len(x_SGD):
        return grad
    whole = grad.new_zeros(x_SGD.shape)
    whole[shape.first : shape.first + len(grad)] = grad
    return whole


def _find(reach: Reach) -> Shape | None:
    if reach.cu_seqlens is not None and reach.cu_seqlens[-1] == len(reach) > 0:
        return Shape(reach.cu_seqlens, reach.cu_seqlens, True, reach.window)
    if len(reach.pieces) != 1 or len(reach.pieces[0].pieces) != 1:
        return None
    (group,) = reach.pieces
    (piece,) = group.pieces
    if group.stop - group.start != len(reach) or piece.kind == "masked":
        return None
    keys = (0, piece.last - piece.first)
    return Shape((0, len(reach)), keys, piece.kind == "causal", first=piece.first)


def why_not(request: Request, largest_dim: int) -> str | None:
    """What library kernels do not know of a request; None if they can serve it."""
    scoring = request.scoring
    if request.device.type != "cuda":
        return "it runs on CUDA devices"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not in {request.dtype}"
    if request.blocks is not None:
        return "it knows no chosen blocks"
    if scoring.softcap is not None or scoring.key_bias_SH is not None or request.dlse:
        return "it knows no soft cap, no biases of keys and no gradient of the lse"
    if request.dim != request.value_dim or request.dim % 8 or request.dim > largest_dim:
        return f"it wants one head dim, a multiple of 8 up to {largest_dim}"
    if shape_of(request.reach) is None:
        return "the reach is neither packed documents nor all of some keys"
    return None
