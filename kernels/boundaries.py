"""Boundaries: where neighbouring things begin, and where the last one ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def boundaries(bounds: Tensor | Sequence[int], what: str, stop: int | None = None) -> Tensor:
    """Checked boundaries, int64 on the host.

    Args:
        bounds: Ascending from 0; things may be empty.
        what: How an error calls them.
        stop: The last one, if it is known.

    Raises:
        ValueError: Not that.
    """
    checked = torch.as_tensor(bounds)
    if checked.ndim != 1 or checked.is_floating_point() or checked.device.type != "cpu":
        raise ValueError(f"{what} must be integers [N + 1] on the host, not {checked.dtype} "
                         f"{list(checked.shape)} on {checked.device}")  # fmt: skip
    checked = checked.long()
    if not len(checked) or int(checked[0]) != 0 or bool((checked.diff() < 0).any()):
        raise ValueError(f"{what} must ascend from 0, not {checked.tolist()[:20]}")
    if stop is not None and int(checked[-1]) != stop:
        raise ValueError(f"{what} must end at {stop}, not at {int(checked[-1])}")
    return checked
