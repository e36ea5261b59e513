"""Every kind of RoPE against transformers, which reads it from the config that we write."""

import pytest
import torch
from longspan.attention.frequencies import frequencies
from longspan.attention.rope import RotaryTable, attention_factor, inverse_frequencies
from longspan.attention.rope_config import write_rope
from longspan.attention.settings import RopeSettings
from longspan.errors import LongspanError
from reference.rope import naive_turns
from support.ropes import LENGTHS, SCALINGS, rope
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

SHARES = {1.0: 32, 0.5: 64, 0.34: 96}
"""Head dims of which these shares are 32 channels."""


def hugging_face(settings: RopeSettings, head_dim: int, length: int) -> LlamaConfig:
    fields = write_rope(settings, max_length=length, layers=2, head_dim=head_dim)
    return LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **fields)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("base", [10_000.0, 5e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_equals_transformers_and_the_twin(name, base, share):
    settings, head_dim = rope(name, base, rotary_share=share), SHARES[share]
    for length in LENGTHS:
        config = hugging_face(settings, head_dim, length)
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            # Llama's own reads no partial factor.
            want, factor = Phi3RotaryEmbedding.compute_default_rope_parameters(config)
        else:
            want, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
        found = inverse_frequencies(settings, head_dim, length)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
        assert attention_factor(settings, length) == pytest.approx(factor, rel=1e-12)
        turns, gain = naive_turns(settings, head_dim, length)
        assert frequencies(settings, head_dim, length) == pytest.approx(turns.tolist(), rel=1e-12)
        assert attention_factor(settings, length) == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_a_transformers_module_at_each_length(name):
    """Through its own updates by length, in a model that is built once where length allows."""
    settings = rope(name)
    for length in LENGTHS:
        module = LlamaRotaryEmbedding(hugging_face(settings, 32, length))
        positions = torch.arange(length)
        cos, sin = module(torch.zeros(1), positions[None])
        table = RotaryTable.build(positions, settings, 32, length)
        # fp32 angles and frequencies are off by 1e-7 of a thousand radians.
        torch.testing.assert_close(table.cos_TR, cos[0], atol=3e-4, rtol=0)
        torch.testing.assert_close(table.sin_TR, sin[0], atol=3e-4, rtol=0)


def test_kinds_differ():
    """The comparison above would say nothing of kinds that were all the same."""
    found = {
        name: (*frequencies(rope(name), 32, 1000), attention_factor(rope(name), 1000))
        for name in SCALINGS
    }
    assert len(set(found.values())) == len(SCALINGS)


def test_only_dynamic_and_longrope_depend_on_the_length():
    depends = {
        name
        for name in SCALINGS
        if frequencies(rope(name), 32, 100) != frequencies(rope(name), 32, 1000)
    }
    assert {name.split("_")[0] for name in depends} == {"dynamic", "longrope"}


@pytest.mark.parametrize(
    ("settings", "head_dim", "part"),
    [
        (rope("default"), 7, "head dim is 7"),
        (rope("default", rotary_share=0.3), 10, "rotary_share 0.3 makes 3"),
        (rope("default", rotary_share=0.01), 64, "makes 0"),
        (rope("ntk"), 2, "2 of 2 channels turn"),
        (rope("dynamic", rotary_share=0.5), 4, "2 of 4 channels turn"),
        (rope("longrope"), 64, "short_factors has 16 entries for 32 pairs"),
    ],
)
def test_channels_that_do_not_fit_are_refused(settings, head_dim, part):
    with pytest.raises(LongspanError, match=part) as caught:
        inverse_frequencies(settings, head_dim, 64)
    assert caught.value.fix


def test_wrong_long_factors_are_refused_at_the_length_that_needs_them():
    with pytest.raises(LongspanError, match="long_factors"):
        inverse_frequencies(rope("longrope"), 64, 1000)
