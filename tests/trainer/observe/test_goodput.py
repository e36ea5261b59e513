"""Every second of a run is in one bucket, whatever the clock does and however attempts end."""

import math
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.trainer.observe.attempts import launched, queued
from longspan.trainer.observe.events import EventLog, read_events
from longspan.trainer.observe.goodput import BUCKETS, goodput_so_far, measure_goodput


class Story:
    """Events with a clock that is told how much time passes."""

    def __init__(self):
        self.now, self.attempt, self.events = 1_000_000.0, 0, []

    def then(self, after, event, **fields):
        self.now += after
        record = {"event": event, "time": self.now, "attempt": self.attempt, **fields}
        self.events.append(record)
        return self

    def launch(self, after=0.0):
        self.attempt += 1
        return self.then(after, "launched")

    def steps(self, first, last, seconds=1.0, data_s=0.0):
        for step in range(first, last + 1):
            self.then(seconds, "step", step=step, step_s=seconds, data_s=data_s)
        return self

    def buckets(self, running=False):
        """The buckets that hold anything, in whole milliseconds' accuracy."""
        found = measure_goodput(self.events, running)
        assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
        return {name: round(value, 3) for name, value in found.seconds.items() if value}


def started(after_launch=5.0):
    story = Story().launch()
    story.then(2.0, "run_started")
    return story.then(after_launch - 2.0, "stage_started")


def test_a_straight_run_is_productive_but_for_what_it_says():
    story = started(5.0).then(1.0, "canary", seconds=1.0).steps(1, 10, 1.0, data_s=0.25)
    story.then(2.0, "evaluated", seconds=2.0).then(3.0, "saving", stall_s=3.0)
    story.then(0.5, "finished").then(0.25, "ended", code=0, how="complete")
    found = measure_goodput(story.events)
    assert found.wall_s == 21.75 and found.share == pytest.approx(7.5 / 21.75)
    assert story.buckets() == {
        "start_up": 6.0,
        "productive": 7.5,
        "data": 2.5,
        "evaluation": 2.0,
        "save": 3.0,
        "other": 0.75,
    }
    (attempt,) = found.attempts
    assert (attempt.steps, attempt.start_up_s, attempt.end) == (10, 6.0, "complete")


def test_steps_after_the_checkpoint_that_was_restored_are_lost():
    story = started().steps(1, 7).then(0.5, "ended", code=1, how="failed", reason="rank 1 died")
    story.launch(after=60.0).then(3.0, "restored", step=4, seconds=1.5).then(1.0, "stage_started")
    so_far = {"productive": 4.0, "recomputed": 3.5}
    assert so_far.items() <= story.buckets().items()  # lost at once, not only when trained again
    story.steps(5, 9).then(0.0, "finished")
    assert story.buckets() == {
        "start_up": 5.0 + 2.5,
        "productive": 9.0,
        "recomputed": 3.0 + 0.5,
        "restore": 1.5,
        "down": 60.0,
    }
    first, second = measure_goodput(story.events).attempts
    assert (first.end, first.reason, second.start_up_s) == ("failed", "rank 1 died", 2.5)


def test_without_a_checkpoint_the_next_attempt_loses_every_step():
    story = started().steps(1, 3, data_s=0.5)
    assert story.buckets() == {"start_up": 5.0, "productive": 1.5, "data": 1.5}
    story.launch().then(5.0, "stage_started").steps(1, 1)
    assert story.buckets() == {"start_up": 10.0, "productive": 1.0, "recomputed": 3.0}


def test_a_rewind_inside_an_attempt_loses_the_steps_that_follow_again():
    story = started().steps(1, 6).then(1.0, "restored", step=2, seconds=1.0).steps(3, 6)
    assert story.buckets() == {
        "start_up": 5.0,
        "productive": 6.0,
        "recomputed": 4.0,
        "restore": 1.0,
    }


def test_silence_beyond_a_typical_step_before_the_end_is_a_hang():
    story = started().steps(1, 5, 2.0).then(600.0, "ended", code=1, how="failed")
    assert story.buckets() == {
        "start_up": 5.0,
        "productive": 10.0,
        "recomputed": 2.0,
        "hang": 598.0,
    }
    # One that says itself that it stops does not hang.
    story = started().steps(1, 5, 2.0).then(1.0, "stopped").then(600.0, "ended", code=75)
    assert story.buckets() == {"start_up": 5.0, "productive": 10.0, "other": 601.0}


def test_an_attempt_that_never_trained_is_start_up():
    story = Story().launch().then(30.0, "ended", code=2, how="failed", reason="no such file")
    assert story.buckets() == {"start_up": 30.0}
    assert measure_goodput(story.events).attempts[0].reason == "no such file"


def test_waiting_for_machines_is_the_queue_and_the_rest_is_down():
    story = started().steps(1, 2).then(0.0, "stopped").then(0.0, "ended", code=75)
    story.attempt = 2
    story.then(10.0, "queued").then(100.0, "launched").then(4.0, "stage_started").steps(3, 3)
    assert story.buckets() == {"start_up": 9.0, "productive": 3.0, "down": 10.0, "queue": 100.0}


def test_a_hang_is_as_long_as_it_was_silent():
    story = started().steps(1, 2).then(300.0, "hang", silent_s=299.0).then(4.0, "ended", code=1)
    assert story.buckets() == {
        "start_up": 5.0, "productive": 2.0, "hang": 302.0, "recomputed": 2.0
    }  # fmt: skip


def test_a_queued_attempt_keeps_its_number(tmp_path):
    events = tmp_path / "events.jsonl"
    assert launched(events) == 1
    assert queued(events) == 2 and launched(events, 2, ranks=4) == 2
    assert launched(events) == 3
    assert [event["event"] for event in read_events(events)] == [
        "launched", "queued", "launched", "launched"
    ]  # fmt: skip


def test_steps_that_are_reported_late_lose_nothing():
    story = started()
    # As the loop does it: a step is told of while the next one runs, the last two at once.
    story.then(2.0, "step", step=1, step_s=1.0).then(1.0, "step", step=2, step_s=1.0)
    story.then(0.0, "step", step=3, step_s=1.0)
    assert story.buckets() == {"start_up": 5.0, "productive": 3.0}
    story.then(2.0, "step", step=4, step_s=1.0)
    assert story.buckets(running=True) == {"start_up": 5.0, "productive": 5.0}
    assert story.buckets() == {"start_up": 5.0, "productive": 4.0, "recomputed": 1.0}


def test_a_save_in_the_background_costs_what_training_waited():
    story = started().steps(1, 2).then(0.25, "saving", step=2, stall_s=0.25)
    story.then(1.0, "step", step=3, step_s=1.0)
    story.then(1.0, "step", step=4, step_s=1.0).then(0.0, "saved", seconds=2.0)
    assert story.buckets() == {"start_up": 5.0, "productive": 4.0, "save": 0.25}


def test_a_bad_step_costs_its_time_and_a_rewind_what_came_after_the_checkpoint():
    story = started().steps(1, 3).then(1.0, "skipped", step=4).steps(5, 6)
    assert story.buckets() == {"start_up": 5.0, "productive": 5.0, "recomputed": 1.0}
    story.then(1.0, "rewound", to=2, **{"from": 7}).then(0.0, "stopped")
    assert story.buckets() == {"start_up": 5.0, "productive": 2.0, "recomputed": 5.0}


def test_a_clock_that_goes_back_makes_no_time_and_loses_none():
    story = started().steps(1, 2)
    story.now -= 100.0
    story.steps(3, 4)
    story.now += 100.0
    story.steps(5, 5).then(0.0, "stopped")
    # The two steps for which time stood still are only known to be something.
    assert story.buckets() == {"start_up": 5.0, "productive": 3.0, "other": 2.0}


def test_no_events_are_no_time():
    found = measure_goodput([])
    assert found.share is None and not any(found.seconds.values()) and found.attempts == ()
    assert measure_goodput([{"event": "step"}, {"time": "noon"}, {}]).wall_s == 0


def test_so_far_counts_up_to_now(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("launched")
    log.write("stage_started")
    time.sleep(0.2)
    found = goodput_so_far(log.path)
    assert 0.2 <= found.seconds["other"] <= found.wall_s and len(found.attempts) == 1
    assert found.wall_s == pytest.approx(sum(found.seconds[name] for name in ("other", "start_up")))


NAMES = ["queued", "launched", "run_started", "restored", "stage_started", "canary", "step"]
NAMES += [
    "skipped",
    "rewound",
    "evaluated",
    "saving",
    "saved",
    "alarm",
    "hang",
    "straggler",
    "excluded",
    "finished",
    "stopped",
    "ended",
]
WILD = st.sampled_from([None, "x", True, -3, 7, -0.5, 1e300, math.inf, math.nan, []])
SECONDS = st.one_of(st.floats(0, 20), WILD)
FIELDS = {
    **dict.fromkeys(("step_s", "data_s", "seconds", "stall_s"), SECONDS),
    "step": st.one_of(st.integers(0, 12), WILD),
    "code": st.sampled_from([0, 1, 2, 75, None]),
}


@st.composite
def streams(draw):
    """Events in any order, with gaps, a clock that jumps, and fields that are nonsense."""
    now, attempt, events = draw(st.floats(0, 2e9)), 1, []
    for _ in range(draw(st.integers(0, 25))):
        now += draw(st.one_of(st.floats(0, 30), st.floats(-1e4, 1e4)))
        attempt += draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
        event = {"event": draw(st.sampled_from(NAMES)), "attempt": attempt, "time": now}
        event |= draw(st.fixed_dictionaries({}, optional=FIELDS))
        if not draw(st.integers(0, 9)):
            event[draw(st.sampled_from(["time", "attempt"]))] = draw(WILD)
        events.append(event)
    return events


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(streams(), st.booleans())
def test_buckets_are_never_negative_and_add_up_to_the_wall(events, running):
    found = measure_goodput(events, running)
    assert found.seconds.keys() == BUCKETS.keys()
    assert all(value >= 0 for value in found.seconds.values())
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=1e-9, abs=1e-5)
    times = [t for e in events if isinstance(t := e.get("time"), float) and 1e-6 < t < 1e12]
    if all(isinstance(e["time"], float) for e in events) and times:
        assert found.wall_s == pytest.approx(max(times) - times[0], abs=1e-3)
