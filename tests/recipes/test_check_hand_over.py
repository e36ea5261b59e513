"""Rules between neighbouring stages: what one adds to the model, the next can take over."""

import pytest
from longspan.errors import RecipeError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine

CPU = Machine(gpus=0, cores=64)


def check(recipe, *changes):
    return check_recipe(load_recipe(recipe, changes), CPU)


def problems(recipe, *changes):
    with pytest.raises(RecipeError) as caught:
        check(recipe, *changes)
    return {problem.path: problem for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("mechanism.dim=32", "mechanism.dim"),
        ("mechanism.heads=4", "mechanism.heads"),
        ("mechanism.share=kv_head", "mechanism.share"),
    ],
)
def test_what_was_learned_keeps_its_shape_and_meaning(change, path):
    found = problems("attention-indexer", f"stages.2.attention.{change}")
    problem = found[f"stages.2.attention.{path}"]
    assert "as in stage warm_up" in problem.expected and problem.fix


def test_a_gate_keeps_its_shape():
    gates = [
        f"stages.{n}.attention.output_gate={kind}" for n, kind in ((0, "head"), (1, "channel"))
    ]
    found = problems("attention-dense", *gates)
    assert "head, as in stage base" in found["stages.1.attention.output_gate"].expected


def test_layers_are_compared_one_by_one():
    """A rule of the second stage decides the mechanism of one layer."""
    rule = "[{last: 1, mechanism: {kind: nsa, compress: linear, window: 64}}]"
    first = "stages.0.attention.mechanism={kind: nsa, window: 64}"
    found = problems("attention-dense", first, f"stages.1.attention.layers={rule}")
    assert list(found) == ["stages.1.attention.layers.0.mechanism.compress"]
    assert (
        "mlp, as in stage base" in found["stages.1.attention.layers.0.mechanism.compress"].expected
    )


def test_another_kind_may_follow():
    assert check("attention-nsa", "stages.1.attention.mechanism={kind: ssa}")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("output_gate=head", "output_gate"),
        ("sinks=true", "sinks"),
        ("layers=[{last: 1, mechanism: {kind: ssa}}]", "layers.0.mechanism.kind"),
    ],
)
def test_nothing_joins_a_model_that_stands_still(change, path):
    found = problems("attention-seer", f"stages.2.attention.{change}")
    assert "would stay as it is drawn" in found[f"stages.2.attention.{path}"].expected


def test_a_model_that_stands_still_keeps_what_it_has():
    gates = [f"stages.{n}.attention.output_gate=head" for n in range(3)]
    sinks = [f"stages.{n}.attention.sinks=true" for n in range(3)]
    assert not check("attention-seer", *gates, *sinks).warnings


def test_what_gets_lost_is_told():
    (lost,) = check("attention-dense", "stages.0.attention.output_gate=head").warnings
    assert lost == "stage stretch: the model loses output_gate, which it learned with"
    (cold,) = check("attention-indexer", "stages.1.trainable=all",
                    "stages.1.attention.mechanism={kind: dense}").warnings  # fmt: skip
    assert "before it has learned anything" in cold
    back = check("attention-indexer", "stages.0.attention.mechanism={kind: ssa}",
                 "stages.2.attention.mechanism={kind: ssa}").warnings  # fmt: skip
    assert back == ("stage stretch: ssa starts from the seed again, as the stage before did not "
                    "have it",)  # fmt: skip
