"""Changes from the command line."""

import pytest
from longspan.errors import RecipeError
from longspan.recipes.loading import load_recipe
from longspan.recipes.overrides import apply_overrides


def test_values_are_yaml_and_the_last_one_counts():
    changes = ["stages.0.tokens=2M", "model.moe={experts: 4}", "seed=1", "seed=2"]
    recipe = load_recipe("quickstart", changes)
    assert recipe.stages[0].tokens == 2_000_000
    assert recipe.model.moe is not None and recipe.model.moe.experts == 4
    assert recipe.seed == 2
    assert recipe.stages[1] == load_recipe("quickstart").stages[1]


def test_blocks_come_into_being_and_the_original_stays():
    before = {"stages": [{"name": "a"}]}
    after, found = apply_overrides(before, ["stages.0.rope.base=5", "model.x=a=b"])
    assert after == {"stages": [{"name": "a", "rope": {"base": 5}}], "model": {"x": "a=b"}}
    assert before == {"stages": [{"name": "a"}]} and not found


@pytest.mark.parametrize(
    ("override", "path", "value", "expected"),
    [
        ("stages.2.tokens=1", "stages.2.tokens", "index 2", "a number below 2"),
        ("stages.-1.tokens=1", "stages.-1.tokens", "index -1", "a number below 2"),
        ("stages.first.tokens=1", "stages.first.tokens", "index first", "a number below 2"),
        ("seed.x=1", "seed.x", "x inside seed, which is 3", "a block of settings"),
        ("seed", "--set seed", "no path=value", "path=value"),
        ("=3", "--set =3", "no path=value", "path=value"),
        ("a..b=3", "--set a..b=3", "no path=value", "path=value"),
        ("seed=[1", "seed", "[1 (expected", "a YAML value"),
    ],
)
def test_places_that_do_not_exist(override, path, value, expected):
    written = {"seed": 3, "stages": [{}, {}]}
    same, (problem,) = apply_overrides(written, [override])
    assert same == written
    assert problem.path == path
    assert problem.value.startswith(value) and problem.expected.startswith(expected)


def test_bad_overrides_and_bad_values_are_reported_together():
    with pytest.raises(RecipeError) as caught:
        load_recipe("smoke", ["stages.9.tokens=1", "sed=3", "precision=fp16"])
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["stages.9.tokens", "precision", "sed"]
