"""FLOPs per token of a stage, against sums by hand."""

import pytest
from longspan.attention.cost import attention_cost
from longspan.trainer.flops import FlopsCounter, peak_flops, training_flops
from longspan.trainer.parameters import active_parameters, count_parameters, layer_shape
from longspan.trainer.settings import ModelSettings, StageSettings

MODEL = ModelSettings(hidden=64, layers=4, heads=4, query_groups=2, ffn_hidden=96)
VOCAB = 100


def stage(length=128, **changes) -> StageSettings:
    data = {"sources": [{"kind": "python-stdlib"}]}
    given = {"name": "a", "length": length, "tokens": 4096, "batch_tokens": 4096, "data": data}
    return StageSettings.model_validate(given | changes)


@pytest.mark.parametrize("document", [None, 1, 100])
def test_dense_attention(document):
    tokens = document or 128
    found = training_flops(MODEL, stage(), VOCAB, document)
    # A token sees (N + 1) / 2 keys on average: 2 products, 2 FLOPs, 3 passes.
    assert found == 6 * active_parameters(MODEL, VOCAB) + 4 * 3 * 4 * 64 * (tokens + 1) / 2


def test_almost_all_parameters_of_a_dense_model_are_used_once():
    wide = MODEL.model_copy(update={"hidden": 1024, "head_dim": 64, "ffn_hidden": 4096})
    parameters = count_parameters(wide, VOCAB)
    assert training_flops(wide, stage(), VOCAB, 1) == pytest.approx(6 * parameters, rel=1e-3)


def test_layers_that_differ_and_a_selection_that_learns_alone():
    rules = [{"first": 1, "mechanism": {"kind": "dense"}}]
    attention = {"mechanism": {"kind": "indexer", "count": 16}, "layers": rules}
    for trainable, times in (("all", 6), ("selection", 2)):
        here = stage(attention=attention, trainable=trainable)
        parts = [
            attention_cost(here.attention, mechanism, layer_shape(MODEL), 128)
            for mechanism in here.attention.mechanisms(4)
        ]
        frozen = trainable == "selection"
        assert len({id(part) for part in parts}) == 4 and parts[1] == parts[3] != parts[0]
        sums = sum(part.training(frozen=frozen) for part in parts) / 128
        found = training_flops(MODEL, here, VOCAB)
        assert found == pytest.approx(times * active_parameters(MODEL, VOCAB) + sums)


def test_documents_of_a_step_are_counted_one_by_one():
    count = FlopsCounter(MODEL, stage(), VOCAB)
    want = sum(n * training_flops(MODEL, stage(), VOCAB, n) for n in (5, 7, 5))
    assert count([5, 7, 5]) == pytest.approx(want)
    assert count([17]) > want  # one long document has more pairs


def test_peaks_are_known_by_name():
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("NVIDIA RTX A1000") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("A100") == 312e12
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("something else") is None
