"""Counted parameters are those of the modules."""

import pytest
from longspan.attention.catalogue import ENTRIES
from longspan.attention.layer import Attention
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.parameters import LayerShape, added_parameters
from longspan.trainer.parameters import active_parameters, attention_parameters, count_parameters
from longspan.trainer.settings import ModelSettings
from support.mechanisms import site

MECHANISMS = [
    {"kind": "dense"},
    {"kind": "window", "window": 8, "first": 2},
    *(
        {"kind": "nsa", "compress_length": 8, "compress_stride": 4, "compress": how, **changes}
        for how in ("mean", "weighted", "linear", "mlp")
        for changes in (
            {"encode_position": "none", "gate": "token"},
            {"encode_position": "keys", "branch_kv": "independent"},
            {"encode_position": "keys_and_values"},
        )
    ),
    {"kind": "infllm_v2"},
    {"kind": "ssa"},
    {"kind": "moba"},
    {"kind": "sharded_heads", "stride": 2},
    {"kind": "seer", "dim": 6},
    {"kind": "seer", "dim": 6, "form": "block"},
    {"kind": "indexer", "dim": 12},
    {"kind": "indexer", "dim": 12, "share": "kv_head", "heads": 1},
    {"kind": "indexer", "dim": 12, "share": "kv_head", "heads": 3},
]
OPTIONS = [{}, {"output_gate": "head"}, {"output_gate": "channel", "sinks": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("settings", MECHANISMS, ids=str)
def test_as_many_as_the_module_has(settings, options):
    stage = AttentionSettings.model_validate({"mechanism": settings, **options})
    for heads, groups in ((4, 4), (6, 2)):
        layer = Attention(stage, stage.mechanism, site(heads, groups, dim=8, hidden=12))
        held = sum(parameter.numel() for parameter in layer.parameters())
        shape = LayerShape(hidden=12, heads=heads, groups=groups, dim=8)
        assert added_parameters(stage, stage.mechanism, shape) == held


def test_every_mechanism_is_counted():
    assert {settings["kind"] for settings in MECHANISMS} == {entry.kind for entry in ENTRIES}


def test_of_a_model_with_layers_that_differ():
    model = ModelSettings(hidden=12, layers=5, heads=4, query_groups=2, ffn_hidden=7)
    rules = [{"every": 2, "mechanism": {"kind": "ssa"}}]
    attention = AttentionSettings.model_validate({"layers": rules, "sinks": True})
    added = 2 * 4 * 12 + 5 * 4
    assert attention_parameters(model, attention) == added
    plain = count_parameters(model, 100)
    assert count_parameters(model, 100, attention) == plain + added
    assert count_parameters(model, 100, AttentionSettings()) == plain


def test_those_that_a_token_is_multiplied_with():
    model = ModelSettings(hidden=12, layers=2, heads=3, head_dim=4, ffn_hidden=7)
    layer = 4 * 12 * 12 + 3 * 12 * 7
    assert active_parameters(model, 50) == 2 * layer + 50 * 12
    # Norms are not products, and the embedding is looked up.
    assert count_parameters(model, 50) == active_parameters(model, 50) + 5 * 12
    moe = ModelSettings.model_validate(model.model_dump() | {"moe": {"experts": 4, "top_k": 2}})
    experts = 4 * 12 * 12 + 2 * 3 * 12 * 7 + 12 * 4
    assert active_parameters(moe, 50) == 2 * experts + 50 * 12
