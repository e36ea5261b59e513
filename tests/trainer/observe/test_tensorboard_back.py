"""TensorBoard shows one value a step, over attempts, rewinds and starts after an error."""

import pytest
from longspan.errors import RunError
from longspan.trainer.observe import wandb_account
from longspan.trainer.observe.tensorboard_back import TensorBoardBack
from longspan.trainer.settings import TrackingSettings
from support.tracked import tensorboard_points


def begin(folder, attempt=1):
    return {"dir": str(folder), "attempt": attempt, "config": {"seed": 5}}


def steps(back, first, last, value):
    for step in range(first, last + 1):
        back.log({"step": step, "stage": "short", "loss": value, "bad": float("nan")})


def shown(folder):
    points = tensorboard_points(folder / "tensorboard")
    assert not [tag for tag, _ in points if tag in ("stage", "step", "bad")]
    return [values for (tag, _), values in sorted(points.items()) if tag == "loss"]


def test_an_attempt_replaces_what_it_computes_again(tmp_path):
    first = TensorBoardBack(begin(tmp_path))
    steps(first, 1, 5, 1.0)
    assert first.finish(1) == ""
    second = TensorBoardBack(begin(tmp_path, 2))
    second.back_to({"step": 3})
    second.log({"step": 3, "restore_s": 1.0})
    steps(second, 4, 6, 2.0)
    second.finish(0)
    assert shown(tmp_path) == [[1.0]] * 3 + [[2.0]] * 3


def test_an_attempt_without_a_checkpoint_begins_anew(tmp_path):
    for attempt in (1, 2):
        back = TensorBoardBack(begin(tmp_path, attempt))
        steps(back, 1, 5 - attempt, float(attempt))
        back.finish(1)
    assert shown(tmp_path) == [[2.0]] * 3


def test_a_rewind_replaces_steps_of_its_own_attempt(tmp_path):
    back = TensorBoardBack(begin(tmp_path))
    steps(back, 1, 5, 1.0)
    back.back_to({"step": 2})
    steps(back, 3, 4, 2.0)
    back.back_to({"step": 4})  # the next stage loads what this one saved
    steps(back, 5, 5, 2.0)
    back.finish(0)
    assert shown(tmp_path) == [[1.0]] * 2 + [[2.0]] * 3
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_start_after_an_error_keeps_what_there_is(tmp_path):
    of_attempt = begin(tmp_path, 2)
    back = TensorBoardBack(of_attempt)
    steps(back, 1, 3, 1.0)
    back.finish(1)
    back = TensorBoardBack(of_attempt)
    steps(back, 4, 5, 2.0)
    back.finish(0)
    assert shown(tmp_path) == [[1.0]] * 3 + [[2.0]] * 2


def test_rows_of_one_step_tell_its_attempt_once(tmp_path):
    back = TensorBoardBack(begin(tmp_path))
    for row in ({"loss": 1.0}, {"seconds": 2.0}):
        back.log({"step": 3, "attempt": 1, "tokens": 96, **row})
    back.finish(0)
    expected = {("attempt", 3): [1.0], ("tokens", 3): [96.0]}
    points = tensorboard_points(tmp_path / "tensorboard")
    assert {key: points[key] for key in expected} == expected and ("seconds", 3) in points


def test_tables_artifacts_and_the_recipe_are_texts(tmp_path):
    back = TensorBoardBack(begin(tmp_path))
    table = {"name": "stages", "columns": ["name", "loss"], "rows": [["a", 1.5]], "at": {"step": 4}}
    back.table(table)
    back.artifact({"type": "checkpoint", "path": "/here/step-4", "metadata": {"step": 4}})
    back.summary({"tokens": 5})
    back.finish(0)
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for text in (b"| name | loss |", b"| a | 1.5 |", b"/here/step-4", b"seed: 5", b"tokens: 5"):
        assert text in content


def test_the_package_is_asked_for_before_training(monkeypatch):
    wandb_account.check_tracking(TrackingSettings(wandb="off", tensorboard=True))
    find = wandb_account.importlib.util.find_spec
    monkeypatch.setattr(
        wandb_account.importlib.util,
        "find_spec",
        lambda name: None if "tensor" in name else find(name),
    )
    with pytest.raises(RunError, match="tensorboard is true and the package tensorboardX"):
        wandb_account.check_tracking(TrackingSettings(wandb="off", tensorboard=True))
    wandb_account.check_tracking(TrackingSettings(wandb="off"))
