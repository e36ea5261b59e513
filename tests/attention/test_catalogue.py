"""Attention in words, and a catalogue that leaves no mechanism out."""

from typing import get_args

import pytest
from longspan.attention.catalogue import ENTRIES, mechanism_words, words
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.mechanism_settings import MechanismSettings
from longspan.attention.parameters import LayerShape, added_parameters

KINDS = [settings.model_fields["kind"].annotation for settings in
         get_args(get_args(MechanismSettings)[0])]  # fmt: skip


def attention(**settings) -> AttentionSettings:
    return AttentionSettings.model_validate(settings)


def test_every_mechanism_is_in_the_catalogue():
    assert [entry.kind for entry in ENTRIES] == [get_args(kind)[0] for kind in KINDS]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.kind)
def test_what_adds_no_parameters_says_so(entry):
    settings = {"kind": entry.kind} | ({"window": 8} if entry.kind == "window" else {})
    stage = attention(mechanism=settings)
    added = added_parameters(stage, stage.mechanism, LayerShape(8, 4, 2, 4))
    assert (added == 0) == (entry.parameters == "none")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "dense"}, "dense"),
        ({"kind": "window", "window": 4096}, "window 4,096"),
        ({"kind": "window", "window": 64, "first": 4}, "window 64 and the first 4"),
        ({"kind": "nsa"}, "nsa 16 x 64 of 32/16, window 512"),
        ({"kind": "infllm_v2"}, "infllm_v2 96 x 64 of 32/16, dense below 8,192"),
        ({"kind": "infllm_v2", "dense_below": 0}, "infllm_v2 96 x 64 of 32/16"),
        ({"kind": "ssa"}, "ssa 16 x 16, 50% sparse"),
        ({"kind": "moba"}, "moba 3 x 512"),
        ({"kind": "sharded_heads"}, "sharded_heads 16 x 64 and 1 of 8 others"),
        ({"kind": "seer"}, "seer for queries, 64 x 64 in evaluations"),
        (
            {"kind": "seer", "form": "block", "evaluate": "dense"},
            "seer for query blocks, blocks of 64, dense in evaluations",
        ),
        (
            {"kind": "seer", "evaluate": "threshold", "threshold": 5e-4},
            "seer for queries, blocks of 64 above 0.0005 in evaluations",
        ),
        ({"kind": "indexer"}, "indexer 2,048 tokens"),
        ({"kind": "indexer", "hisa": {}}, "indexer 2,048 tokens out of 64 x 128"),
        ({"kind": "indexer", "block": 128, "count": 16}, "indexer 16 x 128"),
        ({"kind": "indexer", "attend": "dense"}, "indexer dense"),
        (
            {"kind": "indexer", "block": 128, "count": 16, "attend": "dense"},
            "indexer of blocks of 128, dense",
        ),
    ],
)
def test_a_mechanism_in_words(settings, text):
    assert mechanism_words(attention(mechanism=settings).mechanism) == text


def test_layers_and_options_in_words():
    window = {"kind": "window", "window": 64}
    some = [{"first": 1, "mechanism": {"kind": "dense"}}, {"last": 2, "mechanism": window}]
    options = {"output_gate": "channel", "sinks": True, "scale": 0.125, "log_scale_from": "4K"}
    assert words(attention(), 8) == "dense"
    assert words(attention(mechanism={"kind": "moba"}, layers=some, **options), 8) == (
        "moba 3 x 512; window 64 in 2 of 8 layers; dense in 1 of 8 layers; gate per channel; "
        "sinks; scale 0.125; sharper from 4,096"
    )
    # The most common one comes first, though it is not the default.
    assert words(attention(layers=[{"first": 3, "mechanism": window}]), 4) == (
        "window 64; dense in 1 of 4 layers"
    )
    assert words(attention(layers=[{"first": 2, "mechanism": window}]), 4) == (
        "dense; window 64 in 2 of 4 layers"
    )
    assert words(attention(layers=[{"first": 4, "mechanism": window}]), 4) == "window 64"
