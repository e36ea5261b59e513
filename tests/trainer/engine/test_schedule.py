"""Learning-rate schedules at their corners."""

import pytest
from longspan.trainer.engine.schedule import learning_rate
from longspan.trainer.settings import OptimizerSettings


def rates(steps=10, **changes):
    settings = OptimizerSettings(lr=1.0, **{"min_lr": 0.1, "warmup": 0.2} | changes)
    return [learning_rate(settings, step, steps) for step in range(steps)]


def test_warmup_reaches_the_peak_at_its_last_step():
    assert rates(schedule="constant", min_lr=0)[:3] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decay_ends_at_min_lr(schedule):
    found = rates(schedule=schedule)
    assert found[-1] == pytest.approx(0.1)
    assert found[2:] == sorted(found[2:], reverse=True)


def test_linear_and_cosine_halfway():
    assert rates(schedule="linear")[5] == pytest.approx(0.55)
    assert rates(schedule="cosine")[5] == pytest.approx(0.55)


def test_wsd_stays_at_the_peak_until_its_decay():
    assert rates(schedule="wsd", decay=0.3)[:8] == [0.5] + [1.0] * 6 + [pytest.approx(0.7)]
    assert rates(schedule="wsd")[7] == 1.0, "a fifth of the stage unless said otherwise"


def test_a_single_step_without_warmup():
    assert rates(steps=1, schedule="cosine", warmup=0) == [pytest.approx(0.1)]
