"""Megatron's GPTModel from our own layer spec: our attention, norm, positions and loss.

Shapes: R rows of this context rank, the first T of them its tokens (S of the rows local under
sequence parallelism), E hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from ..settings import RunSettings, StageSettings
from .cross_entropy import linear_cross_entropy
from .hooks import mend_router
from .initialize import initialize, leave_empty
from .microbatch import MicroBatch
from .norm import RMSNorm
from .partition import is_added
from .self_attention import Given, SelfAttention

_VOCAB_MULTIPLE = 8


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of the embedding: the vocabulary rounded up so that tensor ranks share it equally."""
    multiple = _VOCAB_MULTIPLE * tensor
    return -(-vocab // multiple) * multiple


def transformer_config(run: RunSettings, stage: StageSettings) -> TransformerConfig:
    """Megatron's configuration of a stage."""
    model, parallel = run.model, stage.parallel
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_hidden,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=run.precision == "bf16",
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        # Only for the marks that megatron sets along with it; see initialize.py for the values.
        perform_initialization=True,
        init_method=leave_empty,
        output_layer_init_method=leave_empty,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        transformer_impl="local",
        **_options(run),
    )


def _options(run: RunSettings) -> dict[str, Any]:
    """What megatron's configuration needs for experts and recompute."""
    options: dict[str, Any] = {}
    if run.model.moe is not None:
        options = {
            "num_moe_experts": run.model.moe.experts,
            "moe_router_topk": run.model.moe.top_k,
            "moe_ffn_hidden_size": run.model.ffn_hidden,
            "moe_aux_loss_coeff": run.model.moe.aux_loss,
            "moe_router_load_balancing_type": "aux_loss" if run.model.moe.aux_loss else "none",
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_dtype": "fp32",
            "moe_router_pre_softmax": not run.model.moe.normalize,
        }
    if run.recompute == "full":
        options |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return options


def _block_spec(
    run: RunSettings, stage: StageSettings, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """The layers of this pipeline rank."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if run.model.moe is None:
        mlp = ModuleSpec(module=MLP, submodules=linears)
    else:
        mend_router()
        experts = ModuleSpec(module=SequentialMLP, submodules=linears)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    given = Given(stage.attention, frozen=stage.trainable == "selection")
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=SelfAttention, submodules=given),
            self_attn_bda=cast(Any, get_bias_dropout_add),
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=cast(Any, get_bias_dropout_add),
        ),
    )
    count = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=cast(Any, RMSNorm))


Weights = Callable[["LongModel"], None]
"""Fills the parameters of a rank's part of the model in place, but for what attention adds."""


class LongModel(GPTModel):
    """A decoder-only model that takes a MicroBatch and returns its loss, never its logits.

    Its weights are drawn from the run's seed, unless `weights` brings them; what the stage's
    attention adds to the model always is.
    """

    def __init__(
        self,
        run: RunSettings,
        stage: StageSettings,
        vocab: int,
        groups: ProcessGroupCollection,
        weights: Weights | None = None,
    ) -> None:
        config = transformer_config(run, stage)
        first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
        super().__init__(
            config=config,
            transformer_layer_spec=cast(Any, _block_spec(run, stage, config)),
            vocab_size=padded_vocab(vocab, stage.parallel.tensor),
            max_sequence_length=stage.length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=run.model.tied_embeddings,
            # Positions come from the layout; megatron's own assume one document and zigzag.
            position_embedding_type="none",
            pg_collection=groups,
        )
        self.settings, self.real_vocab = run.model, vocab
        for name, parameter in self.named_parameters():
            if ".experts." in name:
                # megatron marks experts only where EP > 1; unmarked under TP, their gradients are
                # not summed over the tensor ranks, and their optimizer state has another shape.
                setattr(parameter, "allreduce", False)  # noqa: B010
        if weights is not None:
            weights(self)
        initialize(
            self,
            run.model,
            stage.rope,
            length=stage.length,
            seed=run.seed,
            vocab=vocab,
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
            only=(lambda name: True) if weights is None else is_added,
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch: MicroBatch
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run this pipeline rank's layers.

        Returns:
            Before the last pipeline rank the hidden states [S, 1, E]; on it the weighted sum of
            the losses and the losses [R] of this context rank's rows.
        """
        hidden = self._hidden(batch)
        if not self.post_process:
            return hidden
        weight_VE = self._output_weight()
        rows, rank = weight_VE.shape[0], self.pg_collection.tp.rank()
        return linear_cross_entropy(
            self._gathered(hidden)[:, 0],
            weight_VE,
            batch.labels_R,
            batch.weights_R,
            first=rows * rank,
            valid=max(0, min(rows, self.real_vocab - rows * rank)),
            group=self.pg_collection.tp,
        )

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits [T, vocabulary] of this context rank's tokens; for evaluation and tests."""
        hidden = self._hidden(batch)
        part = batch.own(self._gathered(hidden)[:, 0]) @ self._output_weight().T
        return gather_from_tensor_model_parallel_region(part)[:, : self.real_vocab]

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=batch.tokens_R[None], position_ids=None)
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            packed_seq_params=batch,
            padding_mask=self._spare(batch),
        )

    def _spare(self, batch: MicroBatch) -> torch.Tensor | None:
        """Which of this rank's rows [1, S] are spare, for the router of experts."""
        spare_1R, group = batch.spare_1R, self.pg_collection.tp
        if spare_1R is None or not self.config.sequence_parallel:
            return spare_1R
        return spare_1R.chunk(group.size(), dim=1)[group.rank()]

    def _output_weight(self) -> torch.Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None
        return weight

    def _gathered(self, hidden: torch.Tensor) -> torch.Tensor:
        """All of the context rank's hidden states, whose gradient is summed over tensor ranks."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(hidden)
