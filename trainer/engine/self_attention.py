"""The adaptor that puts a mechanism in the place of megatron's self-attention.

Shapes: T tokens (S of them local under sequence parallelism), E hidden width, H query heads and
G key-value heads of this tensor rank, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from ...attention.mechanism import make_mechanism
from ...attention.settings import AttentionSettings
from .initialize import leave_empty
from .microbatch import MicroBatch
from .norm import RMSNorm


class SelfAttention(MegatronModule):
    """Project with megatron's parallel linears, attend with a mechanism, project out.

    The fused QKV rows are grouped by key-value head: its query heads, its key, its value, so that
    a contiguous split over tensor ranks keeps every group whole.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSettings,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        heads, groups = config.num_attention_heads, config.num_query_groups
        width = config.kv_channels
        assert groups is not None and width is not None
        self.head_width = width
        self.heads_per_group = heads // groups
        shared: dict[str, Any] = {
            "config": config,
            "tp_group": pg_collection.tp,
            "is_expert": False,
        }
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            (heads + 2 * groups) * width,
            init_method=leave_empty,
            bias=config.add_qkv_bias,
            gather_output=False,
            skip_bias_add=False,
            **shared,
        )
        self.linear_proj = RowParallelLinear(
            heads * width,
            config.hidden_size,
            init_method=leave_empty,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            **shared,
        )
        # megatron sums the gradients of parameters with these names over the tensor ranks.
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = RMSNorm(config, width, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, width, config.layernorm_epsilon)
        self.mechanism = make_mechanism(submodules)

    def forward(
        self, hidden_states: torch.Tensor, *, packed_seq_params: MicroBatch, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention output [S, 1, E] of the normalised layer input [S, 1, E], and no bias."""
        qkv, _bias = self.linear_qkv(hidden_states)
        tokens, width = qkv.shape[0], self.head_width
        qkv_TGXD = qkv.view(tokens, -1, self.heads_per_group + 2, width)
        q_THD = qkv_TGXD[:, :, :-2].reshape(tokens, -1, width)
        k_TGD, v_TGD = qkv_TGXD[:, :, -2], qkv_TGXD[:, :, -1]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_THD, k_TGD = self.q_layernorm(q_THD), self.k_layernorm(k_TGD)
        hidden_TE = None
        if self.mechanism.needs_hidden:
            hidden_TE = self._gathered(hidden_states)[:, 0]
        ctx = packed_seq_params.context(self.layer_number - 1)
        out_THD = self.mechanism(hidden_TE, q_THD, k_TGD, v_TGD, ctx)
        return self.linear_proj(out_THD.reshape(tokens, 1, -1))

    def _gathered(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All tokens' layer input under sequence parallelism."""
        if not self.config.sequence_parallel:
            return hidden_states
        return gather_from_sequence_parallel_region(hidden_states)
