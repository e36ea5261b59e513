"""The run directory: created once, opened by the same recipe only, never overwritten."""

import json
import multiprocessing
import os
import signal

import pytest
from longspan.errors import RunError
from longspan.trainer.run_directory import RunDirectory, create_or_open, write_atomically
from longspan.trainer.settings import RunSettings
from support.short_run import STAGE, short_run


def settings(**changes) -> RunSettings:
    stage = {**STAGE, "data": {"sources": [{"kind": "text", "paths": ["a/*.txt"]}]}}
    return short_run(**{"stages": [stage, {**stage, "name": "long", "length": 1024}]} | changes)


def everything(path):
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files if file.name != "run.lock"}


def test_a_new_run_is_self_contained(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-forty-characters")
    monkeypatch.chdir(tmp_path)
    directory = create_or_open(tmp_path / "runs" / "new", settings(), "tiny")
    assert directory.load_settings() == settings()
    assert str(directory) == "runs/new"
    environment = directory.read_environment()
    assert environment["recipe"] == "tiny" and environment["packages"]["torch"]
    assert directory.working_directory() == tmp_path
    for folder in (directory.logs, directory.checkpoints, directory.evaluations):
        assert folder.is_dir()
    assert not any(b"a-secret" in content for content in everything(directory.path).values())


def test_the_same_recipe_opens_the_run_and_changes_nothing(tmp_path):
    create_or_open(tmp_path / "run", settings(), "tiny")
    before = everything(tmp_path / "run")
    assert create_or_open(tmp_path / "run", settings(), "tiny").load_settings() == settings()
    assert everything(tmp_path / "run") == before


def test_another_recipe_is_refused_with_the_settings_that_differ(tmp_path):
    create_or_open(tmp_path / "run", settings(), "tiny")
    before = everything(tmp_path / "run")
    stages = settings().model_dump(mode="json")["stages"]
    stages[1]["length"] = 2048
    with pytest.raises(RunError) as caught:
        create_or_open(tmp_path / "run", settings(seed=7, stages=stages), "tiny")
    assert "seed: 1234 -> 7" in str(caught.value)
    assert "stages.1.length: 1024 -> 2048" in str(caught.value)
    assert "stages.0" not in str(caught.value)
    assert "--run-dir" in caught.value.fix and "delete" in caught.value.fix
    assert everything(tmp_path / "run") == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"holds no run \(it has thesis.tex\)"):
        create_or_open(tmp_path, settings(), "tiny")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        create_or_open(tmp_path / "thesis.tex", settings(), "tiny")


def test_a_launch_that_was_killed_while_it_created_the_folder_does_not_block_it(tmp_path):
    for name in ("run.lock", "environment.json", "recipe.yaml.writing"):
        (tmp_path / name).write_text("{")
    assert create_or_open(tmp_path, settings(), "tiny").load_settings() == settings()


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--run-dir"):
        create_or_open(tmp_path / "file" / "run", settings(), "tiny")


def test_a_full_disk_is_a_message_and_leaves_no_half_run(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"(?s)No space left on device.*free some space"):
        create_or_open(tmp_path / "run", settings(), "tiny")
    assert not RunDirectory(tmp_path / "run").is_run()


def test_missing_and_unreadable_runs_are_messages(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        RunDirectory(tmp_path / "nowhere").load_settings()
    with pytest.raises(RunError, match="holds no run"):
        RunDirectory(tmp_path).load_settings()
    (tmp_path / "recipe.yaml").write_text("seed: [")
    with pytest.raises(RunError, match="cannot be read"):
        RunDirectory(tmp_path).load_settings()
    (tmp_path / "recipe.yaml").write_text("sneed: 1")
    with pytest.raises(RunError, match="written by longspan unknown"):
        RunDirectory(tmp_path).load_settings()


def test_complete_only_with_a_whole_summary(tmp_path):
    directory = create_or_open(tmp_path / "run", settings(), "tiny")
    assert not directory.is_complete()
    directory.mark_complete({"tokens": 5})
    assert directory.is_complete() and directory.read_summary() == {"tokens": 5}
    directory.complete.write_text('{"tokens"')
    assert not directory.is_complete()


def test_a_torn_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def _hold(path, ready):
    with RunDirectory(path).lock():
        ready.set()
        signal.pause()


def test_the_lock_names_its_owner_and_falls_when_the_owner_is_killed(tmp_path):
    directory = create_or_open(tmp_path / "run", settings(), "tiny")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(directory.path, ready))
    owner.start()
    assert ready.wait(20)
    with pytest.raises(RunError, match=f"in use by process {owner.pid} on "), directory.lock():
        pass
    assert json.loads((directory.path / "run.lock").read_text())["pid"] == owner.pid
    owner.kill()
    owner.join()
    with directory.lock():
        pass
