"""Agreement: what rank 0 does alone is told to all ranks, which go on together or fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ...errors import LongspanError

Result = TypeVar("Result")


def on_first_rank(work: Callable[[], Result]) -> Result:
    """The result of rank 0's work, on all ranks.

    Raises:
        LongspanError: On all ranks: what the work raised.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except LongspanError as error:
            told = [(None, error)]
    dist.broadcast_object_list(told)
    result, error = told[0]
    if error is not None:
        raise error
    return result
