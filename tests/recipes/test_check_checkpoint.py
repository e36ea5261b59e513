"""Rules of checkpoint settings."""

import os
from importlib.util import find_spec

import pytest
from longspan.errors import Problem
from longspan.recipes import check_checkpoint as module
from longspan.recipes.check import check_recipe
from longspan.recipes.check_checkpoint import check_checkpoint
from longspan.recipes.loading import load_recipe
from longspan.trainer.checkpoint.settings import CheckpointSettings


def problems(**settings) -> list[Problem]:
    return list(check_checkpoint(CheckpointSettings(**settings)))


def problem(**settings) -> str:
    (found,) = problems(**settings)
    return str(found)


def test_a_recipe_is_checked_for_them():
    with pytest.raises(Exception, match=r"checkpoint\.keep_every: got 70; expected a multiple of"):
        check_recipe(load_recipe("quickstart", ["checkpoint.keep_every=70", "checkpoint.every=20"]))


def test_checkpoints_that_stay_are_among_those_that_are_written():
    assert problems(every=20, keep_every=60) == [] == problems(every=20)
    assert "fix: keep_every: 60 or 80" in problem(every=20, keep_every=70)
    assert "fix: keep_every: 20" in problem(every=20, keep_every=3)


@pytest.mark.parametrize("where", ["checkpoints", "a/b", "/tmp/new/place", "~/place", "s3://b/p"])
def test_places_that_can_be_written_to_are_taken(where):
    assert problems(where=where) == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "got ''; expected a folder in the run's"),
        (" x", "got ' x'"),
        (".", "expected a folder in the run's"),
        ("../shared", "leads out of it"),
        (f"{__file__}/place", "is a file"),
        ("s3://", "where: s3://bucket/prefix"),
        ("memory://x", "outlives the process"),
        ("nowhere://bucket", "nowhere is none"),
        ("file:///proc/none/x", "expected a folder that can be written to"),
    ],
)
def test_places_that_cannot_are_named(where, message):
    if where.startswith("file:///proc") and os.geteuid() == 0:
        where, message = "file:///proc/version/x", "is a file"
    text = problem(where=where)
    assert text.startswith("checkpoint.where: got ") and message in text


def test_secrets_are_refused_and_not_repeated():
    for where in ("s3://KEY:sEcret@bucket/p", "s3://bucket/p?token=sEcret"):
        text = problem(where=where)
        assert "sEcret" not in text and "AWS_SECRET_ACCESS_KEY" in text


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, missing):
    monkeypatch.setattr(
        module, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    text = problem(where="s3://bucket/p")
    assert f"package {missing}, which is missing" in text and "longspan[s3]" in text
