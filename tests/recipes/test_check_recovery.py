"""Recovery: a setting without effect is an error, and a rewind needs a checkpoint."""

import json
from pathlib import Path

import pytest
from longspan.errors import RecipeError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine
from longspan.trainer.recovery_settings import RecoverySettings

TWO_STAGES = str(Path(__file__).parent / "two_stages.yaml")
CPU = Machine(gpus=0, cores=64)

CASES = {
    "hang.first": ("{hang: {first: 10s}}", "300 or more, as recovery.hang.least"),
    "hang.data": ("{hang: {first: 3h}}", "data: 10800, or lower recovery.hang.first"),
    "sigma": ("{sigma: 5}", "5; no such setting: without spike: skip or rewind it"),
    "window": ("{nonfinite: skip, window: 64}", "64; no such setting: without spike"),
    "max_skips": ("{spike: rewind, max_skips: 3}", "without nonfinite or spike: skip it"),
    "max_rewinds": ("{spike: skip, max_rewinds: 5}", "remove it, or set nonfinite or spike: rew"),
    "back": ("{spike: rewind, back: 3}", "3; at most the 2 checkpoints that checkpoint.keep "
             "leaves; back: 2, or checkpoint.keep: 3"),
}  # fmt: skip


def check(recovery: str, *more: str) -> dict[str, str]:
    try:
        check_recipe(load_recipe(TWO_STAGES, [f"recovery={recovery}", *more]), CPU)
    except RecipeError as error:
        return {p.path: f"{p.value}; {p.expected}; {p.fix}" for p in error.problems}
    return {}


@pytest.mark.parametrize("name", CASES)
def test_a_setting_without_effect_is_a_problem(name):
    written, part = CASES[name]
    found = check(written)
    assert list(found) == [f"recovery.{name}"] and part in found[f"recovery.{name}"]


def test_all_settings_without_effect_are_told_at_once():
    found = check("{sigma: 5, window: 64, max_skips: 3, back: 2, max_rewinds: 5}")
    names = ["sigma", "window", "max_skips", "back", "max_rewinds"]
    assert list(found) == [f"recovery.{name}" for name in names]


@pytest.mark.parametrize(
    "written",
    [
        "{grace: 30s}",
        "{wait: 0, hang: {least: 10, first: 20, data: 30min}}",
        "{retries: {infrastructure: 0, preemption: 3}}",
        "{nonfinite: skip, max_skips: 3}",
        "{spike: skip, sigma: 5, window: 64, max_skips: 3}",
        "{spike: rewind, back: 2, max_rewinds: 5, nonfinite: skip, max_skips: 3}",
    ],
)
def test_what_has_an_effect_is_let_through(written):
    assert check(written) == {}
    assert check("{nonfinite: rewind, back: 3}", "checkpoint.keep=3") == {}


def test_a_resolved_recipe_writes_every_default_and_is_let_through():
    defaults = RecoverySettings().model_dump()
    assert check(json.dumps(defaults)) == {}


@pytest.mark.parametrize(
    ("written", "path"),
    [("{spike: abort}", "recovery.spike"), ("{nonfinite: none}", "recovery.nonfinite"),
     ("{spike: skip, sigma: 0}", "recovery.sigma"), ("{spike: skip, window: 1}", "recovery.window"),
     ("{grace: 0}", "recovery.grace"), ("{wait: -1}", "recovery.wait"),
     ("{hang: {least: 0}}", "recovery.hang.least"),
     ("{retries: {infrastructure: -1}}", "recovery.retries.infrastructure"),
     ("{retries: {infrastructure: null}}", "recovery.retries.infrastructure"),
     ("{retries: {preemption: many}}", "recovery.retries.preemption"),
     ("{retries: {user: 1}}", "recovery.retries.user"), ("{patience: 3}", "recovery.patience")],
)  # fmt: skip
def test_a_value_out_of_range_is_named(written, path):
    assert list(check(written)) == [path]
