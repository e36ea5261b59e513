"""Levels of exactness: what a resume keeps, what it may fall to, and who hears of it."""

import os
import sys
import types
from dataclasses import replace

import pytest
from longspan.errors import CheckpointError, RunError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer import launch
from longspan.trainer.devices import Machine
from longspan.trainer.exactness import CONSENT, Conditions, Promise, allow, declared, go_on, level
from longspan.trainer.run_directory import create_or_open
from support.tiny import tiny_run

CONDITIONS = Conditions(
    machine={"ranks": 4, "device": "cpu", "torch": "2.13.0", "threads (OMP_NUM_THREADS)": "1"},
    layout={"stages": {"0": {"parallel": {"context": 2, "tensor": 1}}}, "exchange": "ring"},
    course={"seed": 5, "model": {"layers": 4}},
    stage={"stages": {"0": {"length": 64, "optimizer": {"lr": 0.01}}}},
    data={"training documents": "aa", "tokenizer": "bb"},
)
GPU = replace(CONDITIONS, machine={**CONDITIONS.machine, "device": "cuda"})
# A part of the conditions, what it becomes, the level then, and the reason.
CHANGES = [
    ("machine", {"ranks": 2}, "E1", "ranks: 4 -> 2"),
    ("machine", {"torch": "2.14.0"}, "E1", 'torch: "2.13.0" -> "2.14.0"'),
    ("machine", {"threads (OMP_NUM_THREADS)": "2"}, "E1", "(OMP_NUM_THREADS)"),
    ("layout", {"exchange": "all_gather"}, "E1", 'exchange: "ring" -> "all_gather"'),
    ("course", {"seed": 6}, "E0", "seed: 5 -> 6"),
    (
        "stage",
        {"stages": {"0": {"length": 64, "optimizer": {"lr": 0.02}}}},
        "E0",
        "stages.0.optimizer.lr: 0.01 -> 0.02",
    ),
    ("data", {"training documents": "ab"}, "E0", 'training documents: "aa" -> "ab"'),
]


def changed(part, change, conditions=CONDITIONS):
    return replace(conditions, **{part: {**getattr(conditions, part), **change}})


@pytest.fixture(autouse=True)
def no_consent(monkeypatch):
    """Whatever a test allows is forgotten after it."""
    monkeypatch.setenv(CONSENT, "")


def resume(now=CONDITIONS, saved=CONDITIONS, promise=None, **how):
    promise = promise or Promise("E2", "E2")
    state = {"conditions": saved.record(), "exactness": promise.record()}
    given = {"inside": True, "setting": None, "checkpoint": "step-8", "run": "runs/a"}
    return go_on(state, now, **{**given, **how})


def test_a_cpu_promises_more_than_a_gpu_which_says_why():
    assert declared("cpu") == ("E2", "")
    best, reason = declared("cuda")
    assert best == "E1" and "atomics" in reason
    assert level(GPU, GPU, inside=True) == ("E1", (reason,))
    assert declared("cpu | cuda")[0] == "E1"


@pytest.mark.parametrize(("part", "change", "expected", "reason"), CHANGES)
def test_what_changes_decides_the_level(part, change, expected, reason):
    assert level(CONDITIONS, CONDITIONS, inside=True) == ("E2", ())
    found, reasons = level(CONDITIONS, changed(part, change), inside=True)
    assert found == expected and len(reasons) == 1 and reason in reasons[0]


@pytest.mark.parametrize(("part", "change", "expected", "reason"), CHANGES)
def test_the_next_stage_may_have_another_layout_and_other_data(part, change, expected, reason):
    own = part in ("layout", "stage", "data")
    found, _ = level(CONDITIONS, changed(part, change), inside=False)
    assert found == ("E2" if own else expected)


def test_what_is_lost_is_named_before_what_only_rounds():
    now = changed("data", {"training documents": "ab"}, changed("machine", {"ranks": 1}))
    found, reasons = level(CONDITIONS, now, inside=True)
    assert found == "E0"
    assert [reason.split(":")[0] for reason in reasons] == ["training documents", "ranks"]


@pytest.mark.parametrize(("part", "change", "expected", "reason"), CHANGES)
def test_a_fall_is_refused_with_what_changed_and_the_way_on(part, change, expected, reason):
    now = changed(part, change)
    with pytest.raises(RunError) as caught:
        resume(now)
    assert f"step-8 would be {expected} (" in caught.value.what and reason in caught.value.what
    assert "the run declared E2 (bit-exact)" in caught.value.what
    assert f"longspan resume runs/a --exactness {expected}" in caught.value.fix


def test_a_fall_goes_on_where_the_launch_or_the_recipe_allows_it():
    moved, lost = changed("machine", {"ranks": 2}), changed("course", {"seed": 6})
    assert resume(moved, setting="E1").level == "E1"
    allow("E1")
    gone = resume(moved)
    assert gone.level == "E1" and gone.promise == Promise("E2", "E1", ("ranks: 4 -> 2",))
    assert gone.words == "exactness E1 (same data and schedule)\n  ranks: 4 -> 2"
    with pytest.raises(RunError, match=r"would be E0 .*, and E1 .* is asked for"):
        resume(lost)
    allow("E0")
    assert resume(lost).promise == Promise("E2", "E0", ("seed: 5 -> 6",))
    allow(None)
    assert CONSENT not in os.environ
    with pytest.raises(RunError):
        resume(moved)


def test_what_was_lost_before_stays_lost_and_is_told():
    gone = resume(promise=Promise("E2", "E1", ("ranks: 4 -> 2",)))
    assert gone.level == "E2" and gone.promise == Promise("E2", "E1", ("ranks: 4 -> 2",))
    assert gone.words.endswith("an earlier resume makes the run as a whole E1")
    assert resume().words == "exactness E2 (bit-exact)"


def test_a_run_that_declared_e1_may_change_its_layout_but_not_its_data():
    promise = Promise("E1", "E1")
    assert resume(changed("machine", {"ranks": 2}, GPU), GPU, promise).level == "E1"
    with pytest.raises(RunError, match="the run declared E1"):
        resume(changed("course", {"seed": 6}, GPU), GPU, promise)
    with pytest.raises(RunError, match=r"E2 .* is asked for"):
        resume(GPU, GPU, promise, setting="E2")


def test_a_checkpoint_without_conditions_promises_nothing():
    given = {"inside": True, "setting": None, "checkpoint": "step-8", "run": "a"}
    gone = go_on({}, CONDITIONS, **given)
    assert gone.level == "E0" and "step-8 does not say" in gone.words
    with pytest.raises(RunError, match=r"E1 .* is asked for"):
        go_on({}, CONDITIONS, **{**given, "setting": "E1"})


@pytest.mark.parametrize(
    "damage",
    [
        {"conditions": 5},
        {"conditions": {"machine": {}}},
        {"conditions": {**CONDITIONS.record(), "data": []}},
        {"exactness": {"declared": "E7", "level": "E2", "reasons": []}},
        {"exactness": None},
    ],
)
def test_conditions_that_cannot_be_read_are_named(damage):
    state = {"conditions": CONDITIONS.record(), "exactness": Promise("E2", "E2").record()}
    given = {"inside": True, "setting": None, "checkpoint": "step-8", "run": "a"}
    go_on(state, CONDITIONS, **given)
    with pytest.raises(CheckpointError, match="conditions of checkpoint step-8 cannot be read"):
        go_on({**state, **damage}, CONDITIONS, **given)


def test_a_consent_that_is_no_level_is_refused(monkeypatch):
    monkeypatch.setenv(CONSENT, "bit-exact")
    with pytest.raises(RunError, match=f"{CONSENT} is bit-exact"):
        resume()


def test_many_reasons_are_counted():
    now = changed("machine", {str(n): n for n in range(30)})
    with pytest.raises(RunError, match="and 18 more"):
        resume(now)


def test_the_ranks_of_one_launch_hear_of_the_consent(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    run = tiny_run(ranks=1, tracking={"wandb": "off"})
    directory = create_or_open(tmp_path / "run", run, "tiny")
    tell = f"import os; print('allowed', os.environ.get({CONSENT!r}))"
    for given, heard in (("E1", "E1"), (None, "None")):
        assert launch.resume(directory.path, (sys.executable, "-c", tell), exactness=given) == 0
        assert f"allowed {heard}\n" in capfd.readouterr().out


def test_under_torchrun_every_rank_hears_of_it_too(tmp_path, monkeypatch):
    heard = []
    module = types.SimpleNamespace(main=lambda path: heard.append(os.environ.get(CONSENT)) or 75)
    monkeypatch.setitem(sys.modules, "longspan.trainer.worker", module)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    directory = create_or_open(tmp_path / "run", tiny_run(tracking={"wandb": "off"}), "tiny")
    assert launch.resume(directory.path, exactness="E1") == 75
    assert launch.resume(directory.path) == 75
    assert heard == ["E1", None]


def test_a_level_that_the_machine_never_has_is_refused_up_front():
    recipe = load_recipe("smoke", ["checkpoint.exactness=E2", "precision=bf16", "ranks=2"])
    check_recipe(recipe, Machine(gpus=0, cores=8))
    with pytest.raises(Exception, match=r"checkpoint\.exactness: got E2; expected at most E1"):
        check_recipe(recipe, Machine(gpus=2, cores=8))
