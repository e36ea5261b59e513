"""The model families of Hugging Face that are read and written, and what each field must say.

A field of config.json is understood, harmless, or harmless in some values only. Whatever else
there is may change what the model computes, and is refused. A field that is missing has the
default of the family's configuration class in transformers, which differs between families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...attention.settings import RopeSettings
from ...errors import ConversionError
from ..settings import ModelSettings

UNDERSTOOD = {
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
"""Fields that become settings, whatever the family."""

KEPT = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""Fields that say nothing about the weights, and are written again on export."""

HARMLESS = KEPT | {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "_attn_implementation_autoset",
    "attn_implementation",
    "unk_token_id",
    "sep_token_id",
    "max_window_layers",
    "add_cross_attention",
    "chunk_size_feed_forward",
    "task_specific_params",
    "problem_type",
    "finetuning_task",
    "id2label",
    "label2id",
    "is_llama_config",
    "unsloth_version",
    "unsloth_fixed",
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams"),
    *("max_length", "min_length", "num_return_sequences"),
}
"""Fields that no forward pass reads; the last ones are about generation."""


@dataclass(frozen=True)
class OneValue:
    """A field that is accepted in one meaning only.

    Attributes:
        values: That are harmless.
        expected: What it has to be, for people.
        default: What transformers takes where the field is missing.
        items: A list of nothing but these is harmless, too.
    """

    values: tuple[Any, ...]
    expected: str
    default: Any = None
    items: frozenset[str] = frozenset()

    def accepts(self, value: Any) -> bool:
        """Whether the field is harmless with this value."""
        listed = isinstance(value, list) and all(item in self.items for item in value)
        return listed or value in self.values


def _only(value: Any, *same: Any) -> OneValue:
    """A field that must be `value`, or one of those that mean the same."""
    return OneValue((value, *same), json.dumps(value), value)


_NONE = OneValue((None, [], {}), "nothing")
_EVERYWHERE = {
    "hidden_act": _only("silu", "swish"),
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "attention_dropout": _only(0.0, None),
    "pretraining_tp": _only(1, None),
    "use_sliding_window": _only(False),
    "is_encoder_decoder": _only(False),
    "use_mrope": _only(False),
    "rope_interleaved": _only(False),
    "layer_types": OneValue((None,), "full_attention only", None, frozenset({"full_attention"})),
    "quantization_config": replace(_NONE, expected="none: weights in bf16 or fp32"),
    "auto_map": replace(_NONE, expected="none: a model's own code is never run"),
}


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: `model_type` in config.json.
        architecture: Its class for language modelling.
        one_value: Fields that are accepted in one meaning.
        harmless: More fields that no forward pass of this family reads.
        understood: More fields that become settings.
        own_defaults: What only this family's class takes for a missing field.
        qkv_bias: Bias on queries, keys and values.
        qk_norm: RMSNorm on queries and keys.
        moe: Experts in every layer.
        nope: Layers without RoPE.
    """

    name: str
    architecture: str
    one_value: Mapping[str, OneValue]
    harmless: frozenset[str] = frozenset()
    understood: frozenset[str] = frozenset()
    own_defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: bool = False
    nope: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """What transformers takes for a field that config.json leaves out."""
        return _DEFAULTS | dict(self.own_defaults)

    def known(self, name: str) -> bool:
        """Whether the field is read here, or is one that no forward pass reads."""
        return name in UNDERSTOOD | HARMLESS | self.harmless | self.understood


_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_UNUSED_WINDOW = frozenset({"sliding_window"})
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        _EVERYWHERE | {"sliding_window": _only(None)},
        own_defaults={"max_position_embeddings": 2048} | _LLAMA_IDS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        _EVERYWHERE | {"sliding_window": replace(_only(None), default=4096)},
        own_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072} | _LLAMA_IDS,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _EVERYWHERE,
        _UNUSED_WINDOW,
        own_defaults=_QWEN,
        qkv_bias=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _EVERYWHERE,
        _UNUSED_WINDOW,
        own_defaults=_QWEN | {"head_dim": 128},
        qk_norm=True,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _EVERYWHERE | {"decoder_sparse_step": _only(1), "mlp_only_layers": _NONE},
        _UNUSED_WINDOW | {"intermediate_size"},
        understood=frozenset(_EXPERTS) | {"num_local_experts"},
        own_defaults=_QWEN | {"num_key_value_heads": 4} | _EXPERTS,
        qk_norm=True,
        moe=True,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        # The class has no pretraining_tp, which SmolLM3-3B sets to 2.
        {name: rule for name, rule in _EVERYWHERE.items() if name != "pretraining_tp"},
        _UNUSED_WINDOW | {"pretraining_tp"},
        understood=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        own_defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
        nope=True,
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}


def family_for(model: ModelSettings, rope: RopeSettings, preferred: str | None = None) -> Family:
    """The family that computes what a model of ours computes.

    Args:
        model: The model.
        rope: Its RoPE, layers without one included.
        preferred: The name of a family that is taken if it is one of several that can.

    Raises:
        ConversionError: No family has what the model combines.
    """
    if rope.rotary_share < 1:
        raise ConversionError(
            f"no supported Hugging Face family turns only a share ({rope.rotary_share:g}) of a "
            "head's channels",
            "rope.rotary_share: 1 in the recipe of a model that shall be exported",
        )
    wanted = {
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "moe": model.moe is not None,
        "nope": bool(rope.nope_layers),
    }
    able = [f for f in _FAMILIES if all(getattr(f, part) == on for part, on in wanted.items())]
    if model.hidden % model.heads:  # transformers' Llama insists on it, whatever its head_dim
        able = [family for family in able if family.name != "llama"]
    if able:
        return next((family for family in able if family.name == preferred), able[0])
    said = {
        "qkv_bias": "biases on q, k and v",
        "qk_norm": "QK-norm",
        "moe": "experts",
        "nope": "layers without RoPE",
    }
    parts = [f"{'' if wanted[part] else 'no '}{words}" for part, words in said.items()]
    raise ConversionError(
        f"no Hugging Face family has {', '.join(parts[:-1])} and {parts[-1]}",
        "export is possible for: llama (none of them), qwen2 (biases), qwen3 (QK-norm), "
        "qwen3_moe (QK-norm and experts), smollm3 (layers without RoPE)",
    )
