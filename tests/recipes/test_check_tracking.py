"""Tracking in a word or a block; a setting without effect is an error."""

import pytest
from longspan.errors import RecipeError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine
from longspan.trainer.settings import TRACKING_WORDS, TrackingSettings

CPU = Machine(gpus=0, cores=64)


def refused(*overrides) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe("smoke", overrides), CPU)
    return {p.path: f"{p.value}; {p.expected}; {p.fix}" for p in caught.value.problems}


@pytest.mark.parametrize("word", TRACKING_WORDS)
def test_a_word_stands_for_its_block(word):
    recipe = load_recipe("smoke", [f"tracking={word}"])
    block = TrackingSettings(**TRACKING_WORDS[word])
    assert recipe.tracking == block and recipe.run().tracking == block
    assert (block.wandb, block.tensorboard) == {
        "none": ("off", False), "wandb": ("online", False), "tensorboard": ("off", True)
    }[word]  # fmt: skip
    check_recipe(recipe, CPU)


@pytest.mark.parametrize("word", ["off", "comet", "true", "3"])
def test_another_word_is_refused_with_those_that_there_are(word):
    (told,) = refused(f"tracking={word}").values()
    assert told.startswith(f"{word}; ") and ("none, wandb, tensor" in told or "block" in told)


def test_a_file_that_builds_on_a_word_changes_a_part_of_its_block(tmp_path):
    (tmp_path / "base.yaml").write_text("base: smoke\ntracking: wandb\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntracking: {project: mine}\n")
    tracking = load_recipe(str(tmp_path / "mine.yaml"), ["tracking.tensorboard=true"]).tracking
    assert tracking == TrackingSettings(wandb="online", project="mine", tensorboard=True)


def test_a_project_without_weights_and_biases_is_a_problem():
    found = refused("tracking={wandb: off, project: mine}")
    assert list(found) == ["tracking.project"] and "no effect" in found["tracking.project"]
    check_recipe(load_recipe("smoke", ["tracking.project=mine"]), CPU)
