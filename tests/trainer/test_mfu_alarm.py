"""The alarm on impossible MFU is right, and heard once."""

from longspan.trainer.mfu_alarm import MfuAlarm


def heard(peak, steps):
    """What is said after each step of (seconds, FLOPs), or None for an idle moment."""
    now = [100.0]
    alarm, found = MfuAlarm(peak, lambda: now[0]), []
    for step in steps:
        if step is None:
            now[0] += 50  # an evaluation
            alarm.idle()
            continue
        now[0] += step[0]
        found.append(alarm.done(step[1]))
    return found


def test_more_than_the_peak_is_said_once():
    said = heard(10.0, [(1, 9), (1, 25), (1, 99)])
    assert said[0] is None and said[2] is None
    assert said[1].startswith("MFU 1.70 is impossible") and "context" in said[1]


def test_what_the_peak_allows_is_not():
    assert heard(10.0, [(1, 10), (1, 10)]) == [None, None]
    # The first step seems to have taken no time; the second one had waited for both.
    assert heard(10.0, [(2, 10), (0.1, 9)]) == [None, None]


def test_an_evaluation_hides_nothing():
    assert heard(10.0, [None, (1, 9), None, (1, 15)])[1].startswith("MFU 1.50")


def test_without_a_known_peak_it_is_silent():
    assert heard(None, [(1, 1e30)]) == [None]


def test_steps_that_take_no_time_at_all_are_impossible():
    assert "impossible" in heard(10.0, [(0, 1)])[0]
