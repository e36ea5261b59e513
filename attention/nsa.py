"""NSA: compressed keys, chosen blocks and a window, summed by gates.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D their dim,
P windows that became one key, B = 3 branches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels.blocks import Blocks
from ..kernels.selection import select_blocks
from ..kernels.selection_rule import SelectionRule
from .compression import Compression
from .context import Context
from .documents import Documents
from .mechanism_settings import NsaSettings
from .probe import in_blocks
from .site import Site


class Nsa(nn.Module):
    """Native sparse attention (DeepSeek, arXiv 2502.11089).

    The compressed branch attends to one key per complete window of tokens, and its probabilities
    choose the blocks of the second branch (eq. 9), without gradient: the compression learns from
    the output of its own branch only. Learned sinks are part of the two branches over tokens.

    Args:
        settings: Of the layer.
        site: Where it works.
    """

    needs_hidden = True

    def __init__(self, settings: NsaSettings, site: Site) -> None:
        super().__init__()
        self.settings, self._shared = settings, site.shared
        self.rule = SelectionRule(settings.count, settings.initial, settings.local)
        encode = settings.encode_position
        self.keys = Compression(settings, encode != "none", site)
        self.values = Compression(settings, encode == "keys_and_values", site)
        self.gate = (
            site.parameter(site.heads, 3, site.hidden, by_head=True)
            if settings.gate == "head"
            else site.parameter(3, site.hidden)
        )
        # Per head: the branch (compressed, window), then key and value.
        shape = site.groups, 2, 2, site.dim, site.hidden
        independent = settings.branch_kv == "independent"
        self.branch_kv = site.parameter(*shape, by_head=True) if independent else None

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, D]; see `Mechanism`."""
        assert hidden_SE is not None
        q_THD, turned_SGD = ctx.turn_queries(q_THD), ctx.turn_keys(k_SGD)
        if self.branch_kv is None:
            far_k = turned_SGD if self.settings.compress_after_rope else k_SGD
            far, near = (far_k, v_SGV), (turned_SGD, v_SGV)
        else:
            far, near = self._branch_kv(hidden_SE, self.branch_kv, ctx)
        k_PGD, v_PGD = self._compressed(*far, ctx)
        seen = ctx.documents.windows_seen(*self._windows)
        # A sink would take probability from the windows, and there is no token behind it to choose.
        compressed_THD, lse_TH = ctx.attend(q_THD, k_PGD, v_PGD, seen, sinks=False, here=True)
        blocks = ctx.choose("nsa", lambda: self._choose(q_THD, k_PGD, lse_TH, ctx))
        ctx.look(q_THD, turned_SGD, in_blocks(blocks))
        chosen_THD, _ = ctx.attend(q_THD, turned_SGD, v_SGV, ctx.reach, blocks)
        near_THD, _ = ctx.attend(q_THD, *near, ctx.documents.reach(self.settings.window))
        gate_THB = self._gates(ctx.of_rows(hidden_SE))
        for branch, name in enumerate(("compressed_gate", "selected_gate", "window_gate")):
            ctx.measure(name, gate_THB[..., branch])
        compressed_TH1, chosen_TH1, near_TH1 = gate_THB.split(1, dim=-1)
        out_THD = compressed_THD * compressed_TH1
        return out_THD + chosen_THD * chosen_TH1 + near_THD * near_TH1

    @property
    def _windows(self) -> tuple[int, int]:
        """Length and stride of what is compressed."""
        return self.settings.compress_length, self.settings.compress_stride

    def _branch_kv(
        self, hidden_SE: Tensor, weight: Tensor, ctx: Context
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys and values [S, G, D] of the compressed branch, and turned ones of the window."""
        groups, _, _, dim, _ = weight.shape
        kv_SX = linear(hidden_SE, weight.flatten(0, 3))
        far_k, far_v, near_k, near_v = kv_SX.unflatten(1, (groups, 4, dim)).unbind(2)
        far_k = ctx.turn_keys(far_k) if self.settings.compress_after_rope else far_k
        return (far_k, far_v), (ctx.turn_keys(near_k), near_v)

    def _compressed(self, k_SGD: Tensor, v_SGD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Compressed keys, turned, and values, [P, G, D] each."""
        windows = ctx.documents.windows(*self._windows)
        k_PGD = ctx.pooled(k_SGD, windows, self.keys)
        v_PGD = ctx.pooled(v_SGD, windows, self.values)
        if self.settings.compress_after_rope:
            return k_PGD, v_PGD
        length, stride = self._windows
        name = f"windows of {length} every {stride}"
        places = ctx.turning(name, lambda: _places(ctx.documents, length, stride), k_PGD)
        return places.apply(k_PGD), v_PGD

    def _choose(self, q_THD: Tensor, k_PGD: Tensor, lse_TH: Tensor, ctx: Context) -> Blocks:
        """The blocks of each query and key-value head, by the compressed branch."""
        windows = ctx.documents.windows(*self._windows)
        grid, scale = ctx.documents.grid(self.settings.block), ctx.scale_of(q_THD)
        # The lse of the branch spares a pass over all scores that would only normalise them.
        return select_blocks(
            q_THD, k_PGD, windows, grid, ctx.reach, self.rule, scale=scale, lse_TH=lse_TH
        )

    def _gates(self, hidden_TE: Tensor) -> Tensor:
        """Of the compressed, the chosen and the window branch, [T, H, B] or [T, 1, B]."""
        # The weight is shared and not the gates: the layer adds up the gradient of hidden states.
        weight = self.gate if self.settings.gate == "head" else self._shared(self.gate)
        return linear(hidden_TE, weight.flatten(0, -2)).sigmoid().unflatten(1, (-1, 3))


def _places(documents: Documents, length: int, stride: int) -> Tensor:
    """Position of each window's first token within its document, int64 [P]."""
    starts_P = documents.windows(length, stride).starts_P
    cu = torch.tensor(documents.cu_seqlens)
    return starts_P - cu[torch.searchsorted(cu, starts_P, right=True) - 1]
