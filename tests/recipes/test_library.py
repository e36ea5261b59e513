"""The recipes of mechanisms come from one template, and every mechanism has one."""

import importlib.util
from pathlib import Path

import longspan
from longspan.attention.catalogue import ENTRIES
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine

ROOT = Path(longspan.__file__).parent


def library():
    path = ROOT / "benchmarks" / "library.py"
    spec = importlib.util.spec_from_file_location("library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_template_says():
    for path, text in library().files().items():
        assert path.read_text() == text, f"run {ROOT}/benchmarks/library.py --write"


def test_every_mechanism_has_a_recipe_that_can_run():
    written = library()
    kinds = {mechanism["kind"] for mechanism in written.MECHANISMS.values()}
    assert kinds == {entry.kind for entry in ENTRIES}
    for name in written.MECHANISMS:
        checked = check_recipe(load_recipe(f"attention-{name}"), Machine(gpus=0, cores=2))
        assert not checked.warnings, checked.warnings
        of_stages = [stage.attention.mechanism.kind for stage in checked.recipe.stages]
        assert of_stages[0] == "dense" and of_stages[-1] == written.MECHANISMS[name]["kind"]
