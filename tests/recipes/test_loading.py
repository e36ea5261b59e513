"""Recipes from YAML: bases, defaults, units, and every mistake at the path where it was written."""

from pathlib import Path

import pytest
import yaml
from longspan.errors import RecipeError
from longspan.recipes.loading import load_recipe, shipped_recipes
from longspan.trainer.settings import RunSettings

STAGE = {"name": "one", "length": "1K", "tokens": "2M", "batch_tokens": "16K"}
RECIPE = {
    "model": {"hidden": 64, "layers": 2, "heads": 4, "ffn_hidden": 128},
    "tokenizer": {"kind": "train"},
    "defaults": {"data": {"sources": [{"kind": "python-stdlib"}]}},
    "stages": [STAGE],
}


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def problems(reference: str, *overrides: str) -> dict[str, tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference, overrides)
    text = str(caught.value)
    assert "Value error" not in text and "pydantic" not in text and "Input should" not in text
    found = [(p.path, (p.value, p.expected, p.fix)) for p in caught.value.problems]
    assert len(dict(found)) == len(found), text
    return dict(found)


def test_shipped_recipes_load_and_have_a_summary():
    assert {"quickstart", "smoke"} <= shipped_recipes().keys()
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.summary


def test_units_defaults_and_name(tmp_path):
    recipe = load_recipe(write(tmp_path / "my run.yaml", RECIPE))
    stage = recipe.stages[0]
    assert (stage.length, stage.tokens, stage.batch_tokens) == (1024, 2_000_000, 16384)
    assert stage.data.sources[0].kind == "python-stdlib"
    assert recipe.name == "my-run"


def test_run_is_the_recipe_without_its_name(tmp_path):
    recipe = load_recipe("quickstart")
    run = recipe.run()
    assert type(run) is RunSettings and run.stages == recipe.stages
    # The resolved recipe of a run directory is itself a recipe of the same run.
    again = load_recipe(write(tmp_path / "recipe.yaml", run.model_dump(mode="json")))
    assert again.run() == run


def test_base_merges_blocks_replaces_lists_and_keeps_its_name(tmp_path):
    write(tmp_path / "below.yaml", {**RECIPE, "name": "below", "summary": "the one below"})
    above = {"base": "below.yaml", "model": {"layers": 6}, "stages": [{**STAGE, "name": "two"}]}
    recipe = load_recipe(write(tmp_path / "above.yaml", above))
    assert (recipe.model.layers, recipe.model.hidden) == (6, 64)
    assert [stage.name for stage in recipe.stages] == ["two"]
    assert (recipe.name, recipe.summary) == ("above", "")


def test_base_may_be_a_shipped_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path / "mine.yaml", {"base": "quickstart", "seed": 7}))
    assert recipe.seed == 7 and recipe.model == load_recipe("quickstart").model


def test_another_kind_replaces_the_block(tmp_path):
    write(tmp_path / "below.yaml", {**RECIPE, "tokenizer": {"kind": "train", "vocab": 300}})
    above = {"base": "below.yaml", "tokenizer": {"kind": "hf", "path": "here"}}
    recipe = load_recipe(write(tmp_path / "above.yaml", above))
    assert recipe.tokenizer.model_dump() == {"kind": "hf", "path": "here"}


def test_base_in_a_circle_is_refused(tmp_path):
    write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    found = problems(str(tmp_path / "a.yaml"))
    assert found["base"][0] == "a.yaml -> b.yaml -> a.yaml"


@pytest.mark.parametrize("base", [3, [], ""])
def test_base_must_be_a_name(tmp_path, base):
    assert "base" in problems(write(tmp_path / "a.yaml", {"base": base}))


def test_missing_base_names_the_file(tmp_path):
    found = problems(write(tmp_path / "a.yaml", {"base": "gone.yaml"}))
    assert list(found) == [str(tmp_path / "gone.yaml")]


def test_unknown_name_gives_the_nearest():
    assert problems("quickstrat")["recipe"][2] == "did you mean quickstart?"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("model: {hidden: 1\nseed: 2\n", " line 2", "expected ',' or '}'"),
        ("seed: 1\nmodel: {}\nseed: 2\n", " line 3", "key `seed` again, after line 1"),
        ("- 1\n- 2\n", "", "a list of 2"),
        ("", "", "nothing"),
        ("a text", "", "a text"),
        ("seed: 1\n---\nseed: 2\n", " line 2", "another document"),
        ("seed: \x01\n", "", "special characters are not allowed"),
        ("seed: !!python/object:os.system x\n", " line 1", "could not determine a constructor"),
        ("[" * 5000, "", "nested too deeply"),
    ],
)
def test_what_is_no_recipe_says_where(tmp_path, text, where, what):
    path = tmp_path / "bad.yaml"
    found = problems(write(path, text))
    ((at, (value, _, _)),) = found.items()
    assert at.startswith(str(path) + where)
    assert what in value


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"seed: \xff\xfe\xfd")
    assert len(problems(str(tmp_path / "bad.yaml"))) == 1
    assert problems(f"{tmp_path}/")[str(tmp_path)][0] == "Is a directory"


def test_yaml_without_surprises(tmp_path):
    text = yaml.safe_dump(RECIPE) + "tracking: {wandb: off}\n"
    recipe = load_recipe(write(tmp_path / "a.yaml", text), ["defaults.optimizer.lr=3e-4"])
    assert recipe.tracking.wandb == "off"
    assert recipe.stages[0].optimizer.lr == 3e-4


def test_aliases_are_copies_for_overrides(tmp_path):
    stage = "{length: 1K, tokens: 2M, batch_tokens: 16K, optimizer: &o {lr: 0.1}, name: a}"
    other = stage.replace("&o {lr: 0.1}", "*o").replace("name: a", "name: b")
    text = yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "stages"})
    path = write(tmp_path / "a.yaml", f"{text}stages: [{stage}, {other}]\n")
    recipe = load_recipe(path, ["stages.0.optimizer.lr=0.2"])
    assert [s.optimizer.lr for s in recipe.stages] == [0.2, 0.1]


def test_a_value_inside_itself_is_refused(tmp_path):
    assert problems(write(tmp_path / "a.yaml", "model: &m {hidden: *m}\n"))


def test_all_mistakes_at_once_where_they_were_written(tmp_path):
    recipe = {
        **RECIPE,
        "modle": {},
        "precision": "bf61",
        "model": {"hidden": 64.5, "layers": True, "heads": 0},
        "tokenizer": {"kind": "train", "vocab": "9Z", "path": "x"},
        "defaults": {
            "batch_tokens": "lots",
            "rope": {"bas": 1},
            "data": {"sources": [{"kind": "parquet", "paths": "x"}, {"paths": ["y"]}]},
        },
        "stages": [
            {"name": "one", "length": "1K", "tokens": "2M"},
            {"name": "two words", "length": None, "tokens": "2M", "optimizer": "fast"},
            7,
        ],
    }
    found = problems(write(tmp_path / "a.yaml", recipe))
    assert set(found) == {
        "modle",
        "precision",
        "model.hidden",
        "model.layers",
        "model.heads",
        "model.ffn_hidden",
        "tokenizer.vocab",
        "tokenizer.path",
        "defaults.batch_tokens",
        "defaults.rope.bas",
        "defaults.data.sources.0.paths",
        "defaults.data.sources.1.kind",
        "stages.1.name",
        "stages.1.length",
        "stages.1.optimizer",
        "stages.2",
    }
    assert found["modle"][2] == "did you mean model?"
    assert found["precision"] == ("bf61", "one of fp32, bf16", "did you mean bf16?")
    assert found["model.layers"][:2] == ("true", "a whole number")
    assert found["model.heads"][1] == "at least 1"
    assert found["model.ffn_hidden"][0] == "nothing"
    assert found["tokenizer.path"][1] == "one of kind, vocab"
    assert "such as 5B" in found["tokenizer.vocab"][1]
    assert found["defaults.rope.bas"][1:] == (
        "one of base, scaling, rotary_share, nope_layers",
        "did you mean base?",
    )
    assert found["defaults.data.sources.0.paths"][2] == "write it as [x]"
    assert "parquet" in found["defaults.data.sources.1.kind"][1]


ROPE_MISTAKES = {
    "scaling.kind": ("{kind: yarm}", "yarm", "one of linear, ntk, dynamic, yarn, llama3, longrope"),
    "scaling.factor": ("{kind: linear, factor: 0.5}", "0.5", "at least 1"),
    "scaling.original_length": ("{kind: dynamic, factor: 2}", "nothing", "a value (Up to this"),
    "scaling.beta_slow": (
        "{kind: yarn, factor: 2, original_length: 4K, beta_fast: 2, beta_slow: 3}",
        "3",
        "less than beta_fast (2)",
    ),
    "scaling.mscale": (
        "{kind: yarn, factor: 2, original_length: 4K, attention_factor: 1, mscale: 1}",
        "1",
        "attention_factor decides",
    ),
    "scaling.mscale_all_dim": (
        "{kind: yarn, factor: 2, original_length: 4K, mscale: 1}",
        "nothing",
        "both of mscale and mscale_all_dim",
    ),
    "scaling.high_freq_factor": (
        "{kind: llama3, factor: 2, original_length: 4K, low_freq_factor: 4, high_freq_factor: 4}",
        "4",
        "more than low_freq_factor (4)",
    ),
    "scaling.long_factors.1": (
        "{kind: longrope, original_length: 4K, short_factors: [1, 1], long_factors: [1, 0]}",
        "0",
        "more than 0",
    ),
    "rotary_share": (None, "1.5", "at most 1"),
    "nope_layers": (None, "[1, 2, 2]", "each layer once, but 2 is repeated"),
}


@pytest.mark.parametrize("path", ROPE_MISTAKES)
def test_mistakes_of_a_rope_are_named_by_its_path(tmp_path, path):
    scaling, got, expected = ROPE_MISTAKES[path]
    change = f"scaling={scaling}" if scaling else f"{path}={got}"
    found = problems(write(tmp_path / "a.yaml", RECIPE), f"defaults.rope.{change}")
    assert found.keys() == {f"defaults.rope.{path}"}
    problem = found[f"defaults.rope.{path}"]
    assert problem[0] == ("a list of 3" if "[" in got else got) and expected in problem[1]


def test_a_stage_without_the_scaling_of_the_others(tmp_path):
    changes = ["defaults.rope.scaling={kind: linear, factor: 2}", "stages.0.rope.scaling=null"]
    recipe = load_recipe(write(tmp_path / "a.yaml", RECIPE), changes)
    assert recipe.stages[0].rope.scaling is None
    dumped = recipe.stages[0].rope.model_dump(mode="json")
    assert dumped == {"base": 10000.0, "scaling": None, "rotary_share": 1.0, "nope_layers": []}


@pytest.mark.parametrize("change", [{"defaults": 3}, {"stages": {}}, {"stages": []}])
def test_broken_stages_and_defaults(tmp_path, change):
    assert change.keys() <= problems(write(tmp_path / "a.yaml", {**RECIPE, **change})).keys()


def test_numbers_that_are_none(tmp_path):
    path = write(tmp_path / "a.yaml", RECIPE)
    found = problems(path, "defaults.optimizer.lr=.nan", "seed=-1", "stages.0.length=1.0001K")
    assert set(found) == {"defaults.optimizer.lr", "seed", "stages.0.length"}
    assert found["stages.0.length"][:2] == ("1.0001K", "a whole number such as 64K")
