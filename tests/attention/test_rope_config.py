"""RoPE from and to config.json, in the spellings of transformers 4 and 5."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.attention.frequencies import attention_factor, frequencies
from longspan.attention.rope_config import read_rope, write_rope
from longspan.attention.settings import RopeSettings
from longspan.errors import LongspanError
from support.ropes import LENGTHS, ORIGINAL, SCALINGS, rope
from transformers import AutoConfig, LlamaConfig, Phi3Config, SmolLM3Config

PAIRS = 8
LAYERS = 6
LONG = 4096


def numbers(least: float, most: float = 1e3) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda value: round(value, 4))


LENGTH = st.integers(2, 2**20)
MAYBE = st.none() | numbers(0.1)
FACTORS = st.lists(numbers(0.5), min_size=PAIRS, max_size=PAIRS)
SCALING = st.one_of(
    st.none(),
    st.fixed_dictionaries({"kind": st.just("linear"), "factor": numbers(1)}),
    st.fixed_dictionaries({"kind": st.just("ntk"), "factor": numbers(1)}),
    st.fixed_dictionaries(
        {"kind": st.just("dynamic"), "factor": numbers(1), "original_length": LENGTH}
    ),
    st.fixed_dictionaries(
        {"kind": st.just("yarn"), "factor": numbers(1), "original_length": LENGTH},
        optional={
            "beta_fast": numbers(20),
            "beta_slow": numbers(0.5, 10),
            "attention_factor": MAYBE,
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("yarn"),
            "factor": numbers(1),
            "original_length": LENGTH,
            "mscale": numbers(0.1),
            "mscale_all_dim": numbers(0.1),
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("llama3"),
            "factor": numbers(1),
            "low_freq_factor": numbers(0.1, 2),
            "high_freq_factor": numbers(2.5),
            "original_length": LENGTH,
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("longrope"),
            "short_factors": FACTORS,
            "long_factors": FACTORS,
            "original_length": LENGTH,
            "factor": st.none() | numbers(1),
            "attention_factor": MAYBE,
        }
    ),
)
ROPES = st.builds(
    lambda **raw: RopeSettings.model_validate(raw),
    base=numbers(2, 1e8),
    scaling=SCALING,
    rotary_share=st.sampled_from([1.0, 0.5, 0.25]),
    nope_layers=st.sets(st.integers(0, LAYERS - 1)).map(tuple),
)


def written(rope: RopeSettings, length: int = LONG, head_dim: int = 64) -> dict[str, Any]:
    fields = write_rope(rope, max_length=length, layers=LAYERS, head_dim=head_dim)
    return json.loads(json.dumps(fields))


@settings(max_examples=200, deadline=None)
@given(ROPES)
def test_what_was_written_is_read_the_same(rope):
    found, kind = read_rope(written(rope)), rope.scaling and rope.scaling.kind
    if kind == "ntk":
        assert found.scaling is None
        assert found.model_copy(update={"base": 9.0, "scaling": None}) == rope.model_copy(
            update={"base": 9.0, "scaling": None}
        )
        assert frequencies(found, 64, LONG) == pytest.approx(frequencies(rope, 64, LONG))
    elif kind == "longrope" and rope.scaling.factor is None:
        factor = max(1.0, LONG / rope.scaling.original_length)
        settled = rope.scaling.model_copy(update={"factor": factor})
        assert found == rope.model_copy(update={"scaling": settled})
        assert attention_factor(found, 7) == attention_factor(rope, LONG)
    else:
        assert found == rope


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_transformers_saves_is_read_as_what_it_computes(name, share, tmp_path):
    """Our file, read and written again by transformers, means the same at every length."""
    ours = rope(name, rotary_share=share)
    head_dim = round(32 / share)
    LlamaConfig(head_dim=head_dim, **written(ours, 1000, head_dim)).save_pretrained(tmp_path)
    found = read_rope(json.loads((tmp_path / "config.json").read_text()))
    for length in LENGTHS:
        want = frequencies(ours, head_dim, length)
        assert frequencies(found, head_dim, length) == pytest.approx(want, rel=1e-12)
        assert attention_factor(found, length) == attention_factor(ours, 1000)


def test_phi3_and_smollm3_take_what_is_written():
    fields = written(rope("longrope"), 1000, 32)
    config = Phi3Config(hidden_size=128, num_attention_heads=4, pad_token_id=0, **fields)
    # Its own default would be 4096.
    assert config.rope_parameters["original_max_position_embeddings"] == ORIGINAL
    fields = written(RopeSettings(nope_layers=(3, 1)))
    assert SmolLM3Config(num_hidden_layers=LAYERS, **fields).no_rope_layers == [1, 0, 1, 0, 1, 1]
    assert "no_rope_layers" not in written(RopeSettings())


YARN = {"kind": "yarn", "factor": 4.0, "original_length": 32768}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_READ = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}
PHI3 = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
PHI3_READ = {
    "kind": "longrope",
    "short_factors": [1.0, 1.1],
    "long_factors": [2.0, 3.0],
    "original_length": 4096,
    "factor": 32.0,
}
QWEN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama 2, which says nothing": ({"model_type": "llama", "rope_scaling": None}, {"base": 1e4}),
    "mistral": ({"rope_theta": 1000000.0}, {"base": 1e6}),
    "llama 3.1 in 4": (
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"base": 5e5, "scaling": LLAMA3_READ},
    ),
    "llama 3.1 in 5": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
        {"base": 5e5, "scaling": LLAMA3_READ},
    ),
    "both at once": (
        {
            "rope_theta": 500000,
            "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3},
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
        },
        {"base": 5e5, "scaling": LLAMA3_READ},
    ),
    "qwen 2.5 with an old type": (
        {
            "rope_theta": 1000000.0,
            "rope_scaling": QWEN,
            "max_position_embeddings": 32768,
            "use_mrope": False,
        },
        {"base": 1e6, "scaling": YARN},
    ),
    "yarn without a factor": (
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {**QWEN, "factor": None},
            "max_position_embeddings": 131072,
        },
        {"base": 1e6, "scaling": YARN},
    ),
    "dynamic": (
        {
            "rope_theta": 1e4,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 2048,
        },
        {"base": 1e4, "scaling": {"kind": "dynamic", "factor": 2.0, "original_length": 2048}},
    ),
    "phi 3 of old": (
        {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "su", **PHI3},
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
        {"base": 1e4, "scaling": PHI3_READ},
    ),
    "phi 3 in 5": (
        {
            "rope_parameters": {
                "type": "su",
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
                **PHI3,
            },
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
        {"base": 1e4, "scaling": PHI3_READ, "rotary_share": 0.75},
    ),
    "phi 3 with a length it does not use": (
        {"rope_theta": 1e4, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
        {"base": 1e4, "rotary_share": 0.5},
    ),
    "longrope that is not stretched": (
        {
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "longrope", **PHI3},
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 4096,
        },
        {"base": 1e4, "scaling": {**PHI3_READ, "factor": 1.0}},
    ),
    "smollm3": (
        {
            "rope_theta": 5e6,
            "no_rope_layers": [1, 1, 0, 1, 1, 0],
            "no_rope_layer_interval": 4,
            "num_hidden_layers": 6,
        },
        {"base": 5e6, "nope_layers": [2, 5]},
    ),
    "smollm3 by interval": (
        {"rope_theta": 5e6, "no_rope_layer_interval": 3, "num_hidden_layers": 7},
        {"base": 5e6, "nope_layers": [2, 5]},
    ),
    "smollm3 by default": (
        {"model_type": "smollm3", "num_hidden_layers": 9},
        {"base": 2e6, "nope_layers": [3, 7]},
    ),
}


@pytest.mark.parametrize(("config", "want"), FILES.values(), ids=FILES.keys())
def test_files_in_the_wild(config, want):
    assert read_rope(config) == RopeSettings.model_validate(want)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"])
def test_a_base_that_is_left_out_is_the_one_of_transformers(model_type):
    theta = AutoConfig.for_model(model_type).rope_parameters["rope_theta"]
    assert read_rope({"model_type": model_type, "num_hidden_layers": 4}).base == theta


def test_a_layer_that_is_not_there_is_not_written():
    with pytest.raises(LongspanError, match=r"nope_layers: got 6; expected less than .* 6 layers"):
        written(RopeSettings(nope_layers=(1, 6)))


def test_a_share_of_one_is_not_written():
    assert "partial_rotary_factor" not in written(RopeSettings())["rope_parameters"]
