"""Window: every query sees the last tokens of its document, and if wanted the first ones.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.reach import Reach
from .context import Context
from .documents import Documents
from .mechanism_settings import WindowSettings
from .merging import merge_outputs
from .probe import in_reach


class Window(nn.Module):
    """Sliding-window attention; with first tokens kept it is StreamingLLM's (arXiv 2309.17453)."""

    needs_hidden = False

    def __init__(self, settings: WindowSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        window, first = self.settings.window, self.settings.first
        q_THD, k_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        near_reach = ctx.documents.reach(window)
        near = ctx.attend(q_THD, k_SGD, v_SGV, near_reach)
        if not first:
            ctx.look(q_THD, k_SGD, in_reach(near_reach))
            return near[0]
        far_reach = ctx.documents.restricted(
            ("first", window, first), lambda every: _first_tokens(every, window, first)
        )
        ctx.look(q_THD, k_SGD, in_reach(near_reach, far_reach))
        far = ctx.attend(q_THD, k_SGD, v_SGV, far_reach, sinks=False)
        return merge_outputs([near, far])


def _first_tokens(documents: Documents, window: int, first: int) -> Reach:
    """The document's first tokens, up to where the window begins."""
    near, start_T = documents.reach(window), documents.starts()
    return Reach(start_T, torch.minimum(start_T + first, near.first_T))
