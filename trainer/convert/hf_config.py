"""config.json of a Hugging Face model: read into settings, and written from them. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from ...attention.rope_config import read_rope, write_rope
from ...attention.settings import RopeSettings
from ...errors import ConversionError, LongspanError, Problem
from ..settings import ModelSettings, MoeSettings
from .families import FAMILIES, KEPT, Family

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "float32": "fp32"}
CONFIG = "config.json"
_WHOLE = {
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("num_experts", "num_local_experts", "num_experts_per_tok"),
    *("max_position_embeddings", "no_rope_layer_interval"),
}
_NUMBERS = {"rms_norm_eps", "initializer_range", "rope_theta", "router_aux_loss_coef"}
_BLOCKS = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class HfModel:
    """What a Hugging Face checkpoint says about its model.

    Attributes:
        family: How Hugging Face calls it.
        model: Its shape, as settings of ours.
        rope: Its RoPE.
        vocab: Rows of the embedding, which may be more than the tokenizer has tokens.
        max_length: Longest sequence in tokens that it is meant for.
        dtype: That config.json names; None where it names none or another one (fp16).
        raw: config.json as it was found; empty for a model that never had one.
    """

    family: Family
    model: ModelSettings
    rope: RopeSettings
    vocab: int
    max_length: int
    dtype: Dtype | None
    raw: Mapping[str, Any] = field(default_factory=dict)


def read_config(folder: Path) -> HfModel:
    """The model that a folder's config.json describes.

    Raises:
        ConversionError: It is missing or unreadable, of an unknown architecture, or has fields
            that are not supported: all of them at once, each with its value.
    """
    raw = _read_json(folder)
    family = _family(raw, folder)
    problems: list[Problem | str] = [*_wrong_types(raw)]
    if problems:
        raise _refused(folder, problems)
    # Token ids that are null are none; missing ones are what the family's class says.
    ids = {name: value for name, value in family.defaults.items() if name in KEPT}
    values = raw | _defaults(family, raw)
    problems += _problems(family, raw)
    try:
        rope = read_rope(values)
    except LongspanError as error:
        problems.append(error.what)
        rope = RopeSettings()
    try:
        model = _model(family, values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        problems += _invalid(error)
        model = None
    if rope.rotary_share < 1:
        expected = f"1: transformers' {family.name} turns all channels"
        problems.append(Problem("partial_rotary_factor", f"{rope.rotary_share:g}", expected))
    if problems or model is None:
        raise _refused(folder, problems)
    return HfModel(
        family,
        model,
        rope,
        vocab=values["vocab_size"],
        max_length=values["max_position_embeddings"],
        dtype=DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype"))),
        raw=ids | raw,
    )


def _refused(folder: Path, problems: Sequence[Problem | str]) -> ConversionError:
    return ConversionError(
        "\n  ".join([f"{folder / CONFIG} cannot be imported:", *map(str, problems)]),
        "use a checkpoint without these, or mend config.json where it is wrong",
    )


def _wrong_types(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Fields that are no number or no block where one belongs; null is as good as missing."""
    for name, value in raw.items():
        got = json.dumps(value)[:80]
        if value is None:
            continue
        if name in _WHOLE and (type(value) is not int or value < 1):
            yield Problem(name, got, "a whole number from 1")
        elif name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            yield Problem(name, got, "a number")
        elif name in _BLOCKS:
            if not isinstance(value, dict):
                yield Problem(name, got, "a block of fields")
                continue
            for kind in ("type", "rope_type"):
                if not isinstance(value.get(kind, ""), str):
                    yield Problem(f"{name}.{kind}", json.dumps(value[kind])[:80], "text")


def write_config(hf: HfModel, dtype: Dtype) -> dict[str, Any]:
    """config.json of a model, complete: no default of transformers decides anything.

    Args:
        hf: The model; token ids are taken from its `raw`.
        dtype: Of the weights.
    """
    model, family = hf.model, hf.family
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": {ours: theirs for theirs, ours in DTYPES.items()}[dtype],
        "vocab_size": hf.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": hf.max_length,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if family.name == "mistral":
        config["sliding_window"] = None
    if family.name == "qwen2":
        del config["attention_bias"]
    if model.moe is not None:
        config |= {
            "moe_intermediate_size": model.ffn_hidden,
            "num_experts": model.moe.experts,
            "num_experts_per_tok": model.moe.top_k,
            "norm_topk_prob": model.moe.normalize,
            "router_aux_loss_coef": model.moe.aux_loss,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    config |= write_rope(
        hf.rope, head_dim=model.head_width, max_length=hf.max_length, layers=model.layers
    )
    # A missing token id has a default of its own in every family.
    return config | {name: hf.raw.get(name) for name in sorted(KEPT)}


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    fix = f"give a local folder that holds {CONFIG} and safetensors files"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConversionError(f"{folder} has no {CONFIG}", fix) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}", fix) from error
    if not isinstance(raw, dict):
        raise ConversionError(f"{path} holds no JSON object", fix)
    return raw


def _family(raw: Mapping[str, Any], folder: Path) -> Family:
    """By `model_type`, which `architectures` must not contradict."""
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is not None and classes in ([], [family.architecture]):
        return family
    known = ", ".join(f"{family.name} ({family.architecture})" for family in FAMILIES.values())
    own = "; it needs code of its own, which is never run" if raw.get("auto_map") else ""
    raise ConversionError(
        f"{folder / CONFIG} is of model_type {kind!r} with architectures {classes!r}{own}",
        f"import a checkpoint of one of the supported families: {known}",
    )


def _defaults(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers takes for fields that are not there or null."""
    found = {name: value for name, value in family.defaults.items() if raw.get(name) is None}
    # Left out it is a number in some families; null is as many as query heads in all of them.
    if raw.get("num_key_value_heads", found.get("num_key_value_heads")) is None:
        found["num_key_value_heads"] = raw.get("num_attention_heads")
    if "rope_theta" in (raw.get("rope_parameters") or raw.get("rope_scaling") or {}):
        found.pop("rope_theta", None)
    if "num_local_experts" in raw:
        found["num_experts"] = raw["num_local_experts"]
    return found


def _problems(family: Family, raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Fields that are not supported, or not with this value."""
    for name, rule in family.one_value.items():
        value = raw.get(name, rule.default)
        if not rule.accepts(value):
            given = "" if name in raw else f" (left out, which means this to {family.name})"
            yield Problem(name, json.dumps(value)[:80] + given, rule.expected)
    for name, value in raw.items():
        if name not in family.one_value and not family.known(name):
            yield Problem(name, json.dumps(value)[:80], "a field that is known to be supported")


def _model(family: Family, values: Mapping[str, Any]) -> ModelSettings:
    """The model's shape; a KeyError names a field that has no default."""
    moe = None
    if family.moe:
        moe = MoeSettings(
            experts=values["num_experts"],
            top_k=values["num_experts_per_tok"],
            aux_loss=values["router_aux_loss_coef"],
            normalize=values["norm_topk_prob"],
        )
        if moe.top_k > moe.experts:
            raise ValueError(f"num_experts_per_tok {moe.top_k} of {moe.experts} experts")
        if moe.top_k == 1 and moe.normalize:
            raise ValueError("num_experts_per_tok 1 with norm_topk_prob: its weight is always 1")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    width = values.get("head_dim")
    if width is not None and width % 2:
        raise ValueError(f"head_dim {width} is odd: RoPE turns channels in pairs")
    if width is None and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    model = ModelSettings(
        hidden=hidden,
        layers=values["num_hidden_layers"],
        heads=heads,
        query_groups=values["num_key_value_heads"],
        head_dim=width or hidden // heads,
        ffn_hidden=values["moe_intermediate_size" if family.moe else "intermediate_size"],
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=values["tie_word_embeddings"],
        norm_epsilon=values["rms_norm_eps"],
        init_std=values["initializer_range"],
        moe=moe,
    )
    if heads % model.kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of {model.kv_heads} kv heads")
    for name in ("vocab_size", "max_position_embeddings"):
        if values[name] < 2:
            raise ValueError(f"{name} is {values[name]!r}, not a number of at least 2")
    return model


def _invalid(error: Exception) -> Iterator[Problem]:
    """What is missing or no number, as problems."""
    if isinstance(error, KeyError):
        yield Problem(str(error.args[0]), "nothing", "a number: it has no default here")
    elif isinstance(error, ValidationError):
        for found in error.errors():
            path = ".".join(map(str, found["loc"]))
            yield Problem(f"model.{path}", repr(found["input"]), cast(str, found["msg"]))
    else:
        yield Problem("sizes", str(error), "sizes that fit together")
