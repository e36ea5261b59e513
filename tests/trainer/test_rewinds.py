"""What follows a bad step, and which checkpoint and data a rewind goes on with."""

import math

import pytest
from longspan.errors import RunError
from longspan.trainer.bad_steps import BadStep, BadSteps
from longspan.trainer.recovery_settings import RecoverySettings
from longspan.trainer.rewinds import (
    Rewind,
    next_sample_after,
    read_rewinds,
    step_to_go_back_to,
    write_rewinds,
)


def bad(step: int, reason="not finite") -> BadStep:
    return BadStep(step, "base", step, 4 * step, reason, math.nan, math.inf)


def test_each_kind_of_bad_step_has_its_own_policy():
    abort = BadSteps(RecoverySettings(spike="skip"))
    with pytest.raises(RunError, match=r"of step 7 \(stage base, step 7; loss nan.* not finite"):
        abort.decide(bad(7))
    assert abort.decide(bad(7, "spike")) == "skip"
    mixed = BadSteps(RecoverySettings(nonfinite="skip", spike="rewind"))
    assert [mixed.decide(bad(7)), mixed.decide(bad(8, "spike"))] == ["skip", "rewind"]


def test_too_many_skips_in_a_row_are_named():
    steps = BadSteps(RecoverySettings(nonfinite="skip", spike="skip", max_skips=2), [3])
    assert steps.decide(bad(4)) == "skip"
    steps.applied()
    assert [steps.decide(bad(6)), steps.decide(bad(7, "spike"))] == ["skip", "skip"]
    assert steps.in_a_row == [6, 7]
    with pytest.raises(RunError, match="3 steps in a row were skipped, 6 to 8:"):
        steps.decide(bad(8))


@pytest.mark.parametrize(
    ("steps", "begin", "back", "to"),
    [
        ([], 0, 1, None),
        ([10, 20, 30], 0, 1, 30),
        ([10, 20, 30], 0, 2, 20),
        ([30, 10, 20], 0, 3, 10),
        ([20, 30], 0, 5, 20),  # older ones are pruned
        ([10, 20, 30], 20, 3, 20),  # the stage began at 20
        ([10, 20], 20, 1, 20),
        ([10], 20, 1, None),
    ],
)
def test_a_rewind_goes_back_over_checkpoints_to_the_beginning_of_the_stage(steps, begin, back, to):
    assert step_to_go_back_to(steps, begin, back) == to


def test_the_last_rewind_to_a_checkpoint_decides_its_data():
    rewinds = [Rewind(25, 20, 0, 100, 20), Rewind(27, 20, 0, 120, 20)]
    assert next_sample_after(rewinds, 0, 20) == 120
    assert next_sample_after(rewinds, 0, 10) is None and next_sample_after([], 0, 0) is None
    assert next_sample_after(rewinds, 1, 20) is None, "of another stage"
    further = [*rewinds, Rewind(29, 10, 0, 130, 90)]
    assert next_sample_after(further, 0, 10) == 130
    assert next_sample_after(further, 0, 20) is None, "that checkpoint was removed: this is new"
    again = [*further, Rewind(24, 20, 0, 180, 8)]
    assert next_sample_after(again, 0, 20) == 180 and next_sample_after(again, 0, 10) == 130


def test_rewinds_are_read_back_and_a_damaged_file_is_no_empty_one(tmp_path):
    path = tmp_path / "rewinds.json"
    assert read_rewinds(path) == []
    rewinds = [Rewind(25, 20, 0, 100, 20), Rewind(3, 0, 0, 12, 12)]
    write_rewinds(path, rewinds)
    assert read_rewinds(path) == rewinds
    for damage in (path.read_text()[:-9], "[{}]", "3"):
        path.write_text(damage)
        with pytest.raises(RunError, match=r"rewinds\.json cannot be read"):
            read_rewinds(path)
