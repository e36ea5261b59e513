"""The attention of one layer: its mechanism, with the options that go with any mechanism.

Shapes: T query rows, S keys, E hidden channels, H query heads, G key-value heads, D key dim,
V value dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from .context import Context
from .gating import OutputGate
from .layer_settings import AttentionSettings
from .mechanism import make_mechanism
from .mechanism_settings import MechanismSettings
from .site import Site


class Attention(nn.Module):
    """A mechanism between sinks, scales and an output gate.

    Args:
        settings: Of the stage.
        mechanism: Of the layer.
        site: Where it works.
    """

    def __init__(
        self, settings: AttentionSettings, mechanism: MechanismSettings, site: Site
    ) -> None:
        super().__init__()
        self.scale, self.log_scale_from = settings.scale, settings.log_scale_from
        # Under its own name, as that is in the names of its parameters in a checkpoint.
        self.kind = mechanism.kind
        self.add_module(self.kind, make_mechanism(mechanism, site))
        gate = settings.output_gate
        self.gate = None if gate == "none" else OutputGate(gate, site)
        # A score of 0 is that of a key that is orthogonal to all queries.
        self.sink_H = (
            site.parameter(site.heads, start=0.0, by_head=True) if settings.sinks else None
        )

    @property
    def mechanism(self) -> nn.Module:
        """The mechanism."""
        return self.get_submodule(self.kind)

    @property
    def needs_hidden(self) -> bool:
        """Whether the layer's normalised input is read."""
        return self.gate is not None or bool(self.mechanism.needs_hidden)

    def forward(
        self,
        hidden_SE: Tensor | None,
        q_THD: Tensor,
        k_SGD: Tensor,
        v_SGV: Tensor,
        ctx: Context,
    ) -> Tensor:
        """Output [T, H, V]; see `Mechanism`."""
        ctx = replace(ctx, scale=self.scale, sink_H=self.sink_H)
        if self.log_scale_from is not None:
            q_THD = q_THD * self._growth(ctx, self.log_scale_from)[:, None, None].to(q_THD.dtype)
        out_THV = self.mechanism(hidden_SE, q_THD, k_SGD, v_SGV, ctx)
        if self.gate is None:
            return out_THV
        assert hidden_SE is not None
        return self.gate(ctx.of_rows(hidden_SE), out_THV, ctx)

    @staticmethod
    def _growth(ctx: Context, start: int) -> Tensor:
        """max(1, log(p) / log(start)) of each query, the p-th token of its document."""
        key = "growth", start
        return ctx.documents.once(
            key, lambda: ((ctx.positions_T + 1).double().log() / math.log(start)).clamp(min=1.0)
        )
