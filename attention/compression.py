"""Compression: the tokens of a window as one key or one value, learned.

Shapes: S keys, G key-value heads, D their dim, L tokens in a window, P windows, C cells of Y
tokens, as many as there are from one window to the next, X what a first matrix makes of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..kernels.mirror import Mirror
from ..kernels.windows import Windows
from .mechanism_settings import NsaSettings
from .pooling import pool_keys
from .site import Site


class Compression(nn.Module):
    """phi of NSA (arXiv 2502.11089, eq. 7): each window of tokens, with their places, as one.

    The parameters of each head are its own. `mlp` has a hidden layer of 2 D channels.

    Args:
        settings: How tokens become one, and which ones.
        encode: Whether a learned vector is added to each token, by its place in the window.
        site: Where it works.
    """

    def __init__(self, settings: NsaSettings, encode: bool, site: Site) -> None:
        super().__init__()
        self.how = settings.compress
        self.length, self.stride = settings.compress_length, settings.compress_stride
        groups, dim, tokens = site.groups, site.dim, self.length * site.dim
        self.weight: nn.Parameter | None = None
        self.last: nn.Parameter | None = None
        if self.how == "weighted":
            self.weight = site.parameter(groups, self.length, start=1.0 / self.length, by_head=True)
        elif self.how == "linear":
            self.weight = site.parameter(groups, tokens, dim, by_head=True)
        elif self.how == "mlp":
            self.weight = site.parameter(groups, tokens, 2 * dim, by_head=True)
            self.last = site.parameter(groups, 2 * dim, dim, by_head=True)
        shape = groups, self.length, dim
        self.place = site.parameter(*shape, start=0.0, by_head=True) if encode else None
        self._one_window = Windows.documents((0, self.length), self.length, self.stride)

    def forward(self, x_SGD: Tensor, windows: Windows) -> Tensor:
        """One key per window, [P, G, D].

        Args:
            x_SGD: Keys or values.
            windows: Of them, complete ones of the length and the stride of the settings.
        """
        made_PGX = self._first(x_SGD, windows)
        if self.place is not None:
            # The first step is linear: the places are one more window, added to all others.
            made_PGX = made_PGX + self._first(self.place.transpose(0, 1), self._one_window)
        if self.last is None:
            return made_PGX
        return (silu(made_PGX).transpose(0, 1) @ self.last).transpose(0, 1)

    def _first(self, x_SGD: Tensor, windows: Windows) -> Tensor:
        """The first, linear step of the compression, [P, G, X]."""
        if self.how == "mean" or self.how == "weighted":
            return pool_keys(x_SGD, windows, self.how, self.weight)
        assert self.weight is not None
        tokens, first = windows.once("strides", lambda: self._cells(windows))
        # Windows overlap, cells do not: each token is gathered once, and its gradient is the same
        # every time, as no two threads add to it.
        x_GSD = x_SGD.transpose(0, 1).index_select(1, tokens.on(x_SGD.device))
        groups, count, dim = x_GSD.shape
        x_GCY = x_GSD.view(groups, count // self.stride, self.stride * dim)
        made_GPX, first_P = x_GCY.new_zeros(()), first.on(x_SGD.device)
        for step, weight_GYX in enumerate(self.weight.split(x_GCY.shape[2], 1)):
            made_GPX = made_GPX + (x_GCY @ weight_GYX).index_select(1, first_P + step)
        return made_GPX.transpose(0, 1)

    def _cells(self, windows: Windows) -> tuple[Mirror, Mirror]:
        """The tokens of all cells, [C * Y], and the first cell of each window, [P]."""
        steps = torch.arange(0, self.length, self.stride)
        starts_C = (windows.starts_P[:, None] + steps).unique()
        tokens_CY = starts_C[:, None] + torch.arange(self.stride)
        return Mirror(tokens_CY.flatten()), Mirror(torch.searchsorted(starts_C, windows.starts_P))
