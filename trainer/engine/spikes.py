"""Spikes: whether a step's loss or gradient norm stands out among the last ones, on the device."""

from __future__ import annotations

import torch

_ROUNDING = 1e-6
"""Of the mean: the least deviation, so that equal values have none of them stand out."""


class Spikes:
    """Compares each step with the steps that were applied before it.

    A value is a spike when it lies more than `sigma` standard deviations above the mean of the
    last `window` ones. Until there are so many, nothing is. What was not applied is not kept. Fed
    with sums over all ranks, it is the same on every rank; nothing here waits for the device.

    Args:
        window: Applied steps to compare with.
        sigma: Standard deviations.
        device: Where the values are.
    """

    def __init__(self, window: int, sigma: float, device: torch.device) -> None:
        self.window, self.sigma = window, sigma
        self._values = torch.zeros(2, window, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._slots = torch.arange(window, device=device)

    def judge(self, values: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
        """Compare a step with the window, and keep it there if it is applied.

        Args:
            values: Mean loss and gradient norm, fp64 [2].
            finite: bool scalar; a step that is not finite is no spike and is not kept.

        Returns:
            Whether it is a spike, a bool scalar on the device.
        """
        mean = self._values.mean(dim=1)
        deviation = self._values.std(dim=1).maximum(mean.abs() * _ROUNDING)
        above = (values > mean + self.sigma * deviation).any()
        spike = above & finite & (self._count >= self.window)
        kept = finite & ~spike & values.isfinite().all()
        here = (self._slots == self._count % self.window) & kept
        self._values = torch.where(here, values[:, None], self._values)
        self._count = self._count + kept
        return spike

    def state(self) -> list[float]:
        """All that a checkpoint has to keep: the count, then losses and norms. Waits."""
        return [float(self._count), *self._values.flatten().tolist()]

    def load(self, state: list[float]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: It is of another window.
        """
        if len(state) != 1 + 2 * self.window:
            raise ValueError(f"{len(state)} numbers are no state of {self.window} steps")
        values = torch.tensor(state[1:], dtype=torch.float64).view(2, self.window)
        self._values = values.to(self._values.device)
        self._count = torch.full_like(self._count, int(state[0]))
