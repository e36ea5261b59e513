import json

import pytest
from longspan.errors import RecipeError
from longspan.recipes.loading import load_recipe
from support.hugging_face import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    return save_tiny("llama", folder, rope_parameters=rope)


def write(path, text):
    path.write_text(text)
    return str(path)


def recipe(tmp_path, model, more=""):
    return write(tmp_path / "mine.yaml", f"base: smoke\nmodel: {{{model}}}\n{more}")


def test_the_checkpoint_decides_model_rope_and_tokenizer(tmp_path, folder):
    loaded = load_recipe(recipe(tmp_path, f'from: "hf:{folder}"'))
    model = loaded.model
    assert (model.hidden, model.layers, model.vocab, model.init) == (32, 4, 101, "random")
    assert model.folder == folder
    assert loaded.tokenizer.model_dump() == {"kind": "hf", "path": str(folder)}
    first, second = loaded.stages
    assert (first.rope.base, first.rope.scaling.factor) == (5000.0, 2.0)
    # A stage's own setting counts; the others stay the checkpoint's.
    assert (second.rope.base, second.rope.scaling.factor) == (100_000.0, 2.0)


def test_a_resolved_recipe_can_be_read_again(tmp_path, folder):
    loaded = load_recipe(recipe(tmp_path, f'from: "hf:{folder}"'))
    again = tmp_path / "recipe.yaml"
    again.write_text(json.dumps(loaded.run().model_dump(mode="json")))
    assert load_recipe(str(again)).run() == loaded.run()


def test_the_balancing_loss_of_a_checkpoint_is_the_recipe_s(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "moe")
    loaded = load_recipe(recipe(tmp_path, f'from: "hf:{tmp_path}/moe", moe: {{aux_loss: 0.5}}'))
    assert (loaded.model.moe.aux_loss, loaded.model.moe.experts) == (0.5, 4)
    with pytest.raises(RecipeError, match=r"model\.moe: got a mapping"):
        load_recipe(recipe(tmp_path, f'from: "hf:{tmp_path}/moe", moe: {{top_k: 1}}'))


BAD = {
    "a contradiction": ('from: "hf:FOLDER", hidden: 64', "", "model.hidden: got 64; expected 32"),
    "a trained tokenizer": (
        'from: "hf:FOLDER"',
        "tokenizer: {kind: train, vocab: 512}",
        "tokenizer.kind: got train",
    ),
    "no scheme": ("from: FOLDER", "", "from: hf:FOLDER"),
    "no such folder": ('from: "hf:/nowhere"', "", "/nowhere has no config.json"),
    "an unknown key": ('from: "hf:FOLDER", widht: 3', "", "model.widht"),
}


@pytest.mark.parametrize(("model", "more", "part"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said(tmp_path, folder, model, more, part):
    text = [t.replace("FOLDER", str(folder)) for t in (model, more, part)]
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, text[0], text[1]))
    assert text[2] in str(caught.value)
