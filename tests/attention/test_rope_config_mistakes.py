"""What is wrong with the RoPE of a config.json is named, with a fix."""

from typing import Any

import pytest
from longspan.attention.rope_config import read_rope
from longspan.errors import LongspanError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PHI3 = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
QWEN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def scaling(**fields: Any) -> dict[str, Any]:
    return {"rope_theta": 1e4, "rope_scaling": fields}


# A config, and what the message and its fix must say.
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no base": ({"model_type": "gptj"}, "rope_theta is missing (model_type 'gptj')", "add rope"),
    "unknown type": (
        scaling(rope_type="yarm", factor=2),
        "rope_scaling.rope_type: got 'yarm'; expected one of default, linear, dynamic, yarn",
        "did you mean yarn?",
    ),
    "several axes": (scaling(type="mrope"), "rope_scaling.type: got 'mrope'", "another model"),
    "unknown field": (
        scaling(rope_type="linear", factr=2, factor=2),
        "rope_scaling.factr: got 2; expected for rope_type linear only factor, partial",
        "did you mean factor?",
    ),
    "no type": (
        scaling(factor=2),
        "rope_scaling.factor: got 2; expected for rope_type default",
        "remove it",
    ),
    "field of another type": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2, "mscale": 1}},
        "rope_parameters.mscale: got 1",
        "remove it",
    ),
    "missing": (
        scaling(type="yarn", factor=2),
        "rope_scaling.original_max_position_embeddings is missing (rope_type yarn)",
        "add rope_scaling.original_max_position_embeddings",
    ),
    "dynamic without a length": (
        scaling(type="dynamic", factor=2),
        "max_position_embeddings is missing (rope_type dynamic)",
        "add max_position_embeddings",
    ),
    "dynamic with two lengths": (
        {
            **scaling(type="dynamic", factor=2, original_max_position_embeddings=4096),
            "max_position_embeddings": 8192,
        },
        "original_max_position_embeddings: got 4096; expected 8192",
        "max_position_embeddings: 4096",
    ),
    "longrope without a length": (
        {**scaling(type="longrope", **PHI3), "original_max_position_embeddings": 8},
        "max_position_embeddings is missing (the factor is left out)",
        "add max_position_embeddings",
    ),
    "a length that is none": (
        {**scaling(type="longrope", **PHI3), "original_max_position_embeddings": "8K",
         "max_position_embeddings": 8192},
        "original_max_position_embeddings: got '8K'; expected a whole number of tokens",
        "correct original",
    ),
    "two bases": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_parameters.rope_theta: got 1000000.0; expected the 10000.0 of rope_theta",
        "remove the one",
    ),
    "two types": (
        scaling(type="mrope", rope_type="default"),
        "rope_scaling.rope_type: got 'default'; expected the 'mrope' of rope_scaling.type",
        "remove the one",
    ),
    "two lengths": (
        {**scaling(type="longrope", original_max_position_embeddings=64, **PHI3),
         "original_max_position_embeddings": 4096},
        "rope_scaling.original_max_position_embeddings: got 64; expected the 4096 of original",
        "remove the one",
    ),
    "per kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters.full_attention: got ['rope_theta']; expected one RoPE for all layers",
        "another model",
    ),
    "no block": ({"rope_scaling": [2]}, "rope_scaling: got [2]; expected a mapping", "correct"),
    "a field that we do not know": (
        {"rope_theta": 1e4, "rope_local_base_freq": 1e4},
        "rope_local_base_freq: got 10000.0; expected no field about RoPE but",
        "another model",
    ),
    "factor below 1": (
        scaling(type="linear", factor=0.5),
        "rope_scaling.factor: got 0.5; expected greater than or equal to 1",
        "correct rope_scaling.factor",
    ),
    "yarn that shortens": (
        {**scaling(**{**QWEN, "factor": None}), "max_position_embeddings": 16384},
        "factor: got 0.5; expected greater than or equal to 1",
        "correct factor",
    ),
    "low above high": (
        scaling(type="llama3", **{**LLAMA3, "low_freq_factor": 4}),
        "rope_scaling.high_freq_factor: got 4.0; expected more than low_freq_factor (4)",
        "correct",
    ),
    "slow above fast": (
        scaling(**QWEN, beta_slow=32),
        "rope_scaling.beta_slow: got 32; expected less than beta_fast (32)",
        "correct",
    ),
    "half of the mscales": (
        scaling(**QWEN, mscale=1),
        "mscale_all_dim: got None; expected both of mscale and mscale_all_dim, or neither",
        "correct",
    ),
    "mscale and attention factor": (
        scaling(**QWEN, mscale=1, mscale_all_dim=1, attention_factor=1.1),
        "rope_scaling.mscale: got 1; expected no such setting: attention_factor decides",
        "correct",
    ),
    "a factor that is no number": (
        scaling(type="longrope", short_factor=[1, "x"], long_factor=[1, 1], factor=2,
                original_max_position_embeddings=64),
        "rope_scaling.short_factor.1: got 'x'; expected a valid number",
        "correct",
    ),
    "a share above 1": (
        {"rope_theta": 1e4, "partial_rotary_factor": 2},
        "partial_rotary_factor: got 2; expected less than or equal to 1",
        "correct",
    ),
    "no list of layers": (
        {"rope_theta": 1e4, "no_rope_layers": [1, 2]},
        "no_rope_layers: got [1, 2]; expected a list of 1",
        "correct",
    ),
    "a short list of layers": (
        {"rope_theta": 1e4, "no_rope_layers": [1, 0], "num_hidden_layers": 3},
        "no_rope_layers: got '2 entries'; expected an entry for each of num_hidden_layers (3)",
        "correct",
    ),
    "no interval": (
        {"rope_theta": 1e4, "no_rope_layer_interval": 0, "num_hidden_layers": 3},
        "no_rope_layer_interval: got 0; expected a whole number from 1",
        "correct",
    ),
    "an interval of unknown layers": (
        {"rope_theta": 1e4, "no_rope_layer_interval": 2},
        "num_hidden_layers is missing (no_rope_layer_interval)",
        "add num_hidden_layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "what", "fix"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_a_fix(config, what, fix):
    with pytest.raises(LongspanError) as caught:
        read_rope(config)
    assert caught.value.what.startswith("config.json: ")
    assert what in caught.value.what and fix in caught.value.fix
