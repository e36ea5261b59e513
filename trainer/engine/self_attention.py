"""The adaptor that puts a mechanism in the place of megatron's self-attention.

Shapes: R rows (S of them local under sequence parallelism), the first T of them tokens, E hidden
width, H query heads and G key-value heads of this tensor rank, D head width, O = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.distributed import ProcessGroup

from ...attention.layer import Attention
from ...attention.layer_settings import AttentionSettings
from ...attention.mechanism_settings import learns_by_itself
from ...attention.site import Site
from .initialize import leave_empty
from .microbatch import MicroBatch
from .norm import RMSNorm


@dataclass(frozen=True)
class Given:
    """What a layer's attention is made from.

    Attributes:
        stage: The attention of the stage.
        frozen: Whether only what selects keys learns.
    """

    stage: AttentionSettings
    frozen: bool


class SelfAttention(MegatronModule):
    """Project with megatron's parallel linears, attend with a mechanism, project out.

    The fused QKV rows are grouped by key-value head: its query heads, its key, its value, so that
    a contiguous split over tensor ranks keeps every group whole.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Given,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group, self.frozen = pg_collection.tp, submodules.frozen
        heads, groups = config.num_attention_heads, config.num_query_groups
        width = config.kv_channels
        assert groups is not None and width is not None
        self.head_width = width
        self.heads_per_group = heads // groups
        self._project(config, heads, groups, width)
        # megatron sums the gradients of parameters with these names over the tensor ranks.
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = RMSNorm(config, width, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, width, config.layernorm_epsilon)
        local = heads // pg_collection.tp.size()
        mechanism = submodules.stage.of_layer(layer_number - 1, config.num_layers)
        self.site = self._site(submodules, layer_number - 1, local, pg_collection.tp)
        self.attention = Attention(submodules.stage, mechanism, self.site)
        self._mark(learns_by_itself(mechanism))

    def _project(self, config: TransformerConfig, heads: int, groups: int, width: int) -> None:
        """Make the projections to queries, keys and values, and of the output."""
        shared: dict[str, Any] = {
            "config": config,
            "tp_group": self.tp_group,
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

    def forward(
        self, hidden_states: torch.Tensor, *, packed_seq_params: MicroBatch, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention output [S, 1, E] of the normalised layer input [S, 1, E], and no bias."""
        qkv, _bias = self.linear_qkv(hidden_states)
        layer, batch = self.layer_number - 1, packed_seq_params
        rows, width = qkv.shape[0], self.head_width
        qkv_TGXD = batch.own(qkv.view(rows, -1, self.heads_per_group + 2, width))
        q_THD = qkv_TGXD[:, :, :-2].flatten(1, 2)
        k_TGD, v_TGD = qkv_TGXD[:, :, -2], qkv_TGXD[:, :, -1]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q_THD, k_TGD = self.q_layernorm(q_THD), self.k_layernorm(k_TGD)
        hidden_TE = None
        if self.attention.needs_hidden:
            hidden_TE = batch.own(self._gathered(hidden_states)[:, 0])
        if batch.cache is not None:
            k_TGD, v_TGD, hidden_TE = batch.cache.extend(layer, k_TGD, v_TGD, hidden_TE)
        twice = self.training and self.config.recompute_granularity == "full"
        ctx = batch.context(
            layer,
            training=self.training,
            # Of the two passes of a recomputed layer only the second has gradients.
            learns=self.training and (torch.is_grad_enabled() or self.frozen),
            twice=twice and not self.frozen,
        )
        out_THD = self.attention(hidden_TE, q_THD, k_TGD, v_TGD, ctx)
        out_RO = out_THD.flatten(1)
        if len(out_RO) < rows:
            out_RO = F.pad(out_RO, (0, 0, 0, rows - len(out_RO)))
        return self.linear_proj(out_RO[:, None])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """megatron's, with the parameters of the attention under a name of this layer's own.

        megatron stores equal layers as one tensor, but not every layer has the same attention.
        """
        own = dict(self.attention.named_parameters())
        split = {name: 0 for name, parameter in own.items() if getattr(parameter, "by_head")}  # noqa: B009
        attention = self._modules.pop("attention")
        try:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self._modules["attention"] = attention
        at = f"{prefix}attention."
        stored = make_sharded_tensors_for_checkpoint(
            own, at, split, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        for tensor in stored.values():
            rest = tensor.key.removeprefix(at)
            tensor.key = f"{prefix}attention.{self.layer_number - 1}.{rest}"
        return state | stored

    def _site(self, given: Given, layer: int, heads: int, group: ProcessGroup) -> Site:
        config, stage = self.config, given.stage
        kinds = [mechanism.kind for mechanism in stage.mechanisms(config.num_layers)]
        tensor = group.size()

        def reduced(x: torch.Tensor, op: Any) -> torch.Tensor:
            if tensor > 1:
                x = x.contiguous()
                dist.all_reduce(x, op=op, group=group)
            return x

        return Site(
            layer=layer,
            layers_alike=kinds.count(kinds[layer]),
            hidden=config.hidden_size,
            heads=heads,
            groups=heads // self.heads_per_group,
            dim=self.head_width,
            first_head=heads * group.rank(),
            all_heads=config.num_attention_heads,
            dtype=config.params_dtype,
            total=partial(reduced, op=dist.ReduceOp.SUM),
            largest=partial(reduced, op=dist.ReduceOp.MAX),
            shared=partial(copy_to_tensor_model_parallel_region, group=group),
        )

    def _mark(self, selects: bool) -> None:
        """Tell megatron which parameters are split over the tensor ranks, and which select keys."""
        at = f"{self.attention.kind}."
        for name, parameter in self.attention.named_parameters():
            setattr(parameter, "selects", selects and name.startswith(at))  # noqa: B010
            split = getattr(parameter, "by_head")  # noqa: B009
            set_tensor_model_parallel_attributes(parameter, split, 0, 1)

    def _gathered(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All tokens' layer input, whose gradient is summed over the tensor ranks."""
        if not self.config.sequence_parallel:
            return copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        return gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=self.tp_group
        )
