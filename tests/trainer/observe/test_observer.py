"""One call reaches events, terminal and tracking; a listener that fails is dropped."""

from pathlib import Path

from longspan.trainer.observe.events import EventLog, read_events
from longspan.trainer.observe.observer import EventSink, Observer
from longspan.trainer.observe.sink import Sink, StepMetrics

STEP = StepMetrics(
    step=3,
    steps=9,
    stage="short",
    stage_step=3,
    stage_steps=4,
    tokens=3072,
    loss=4.5,
    grad_norm=0.5,
    lr=1e-3,
    tokens_per_s=100.0,
    step_s=10.24,
)


def tell_everything(observer):
    observer.run_started({"ranks": 2})
    observer.stage_started("short", 0, {"length": 1024})
    observer.compared(0, {"loss": 4.0, "loss_alone": 4.5})
    observer.step(STEP)
    observer.alarm("mfu", 3, "too fast")
    observer.skipped(4, float("nan"), 2.0, "not finite")
    observer.rewound(5, 3, 8, "spike")
    observer.evaluated("held_out", 3, {"loss": 4.0}, 1.5)
    observer.saving(3, 0.25)
    observer.saved(3, Path("step-3"), 0.5)
    observer.restored(3, Path("step-3"), 0.75)
    observer.message("hello")
    observer.warning("careful")
    observer.stopped(3, "asked to stop")
    observer.finished({"tokens": 3072})
    observer.close()


def test_every_kind_of_news_is_an_event(tmp_path):
    path = tmp_path / "events.jsonl"
    tell_everything(Observer([EventSink(EventLog(path))]))
    events = list(read_events(path))
    assert [event.pop("event") for event in events] == [
        "run_started",
        "stage_started",
        "canary",
        "step",
        "alarm",
        "skipped",
        "rewound",
        "evaluated",
        "saving",
        "saved",
        "restored",
        "message",
        "warning",
        "stopped",
        "finished",
    ]
    stage, canary, step, alarm, skipped, rewound = events[1:7]
    assert (skipped["step"], skipped["loss"], skipped["grad_norm"]) == (4, None, 2.0)
    assert (rewound["from"], rewound["to"], rewound["sequences"]) == (5, 3, 8)
    assert (skipped["reason"], rewound["reason"]) == ("not finite", "spike")
    assert (stage["stage"], stage["index"], stage["length"]) == ("short", 0, 1024)
    assert (step["step"], step["loss"], step["tokens_per_s"]) == (3, 4.5, 100.0)
    assert (canary["step"], canary["loss"], canary["loss_alone"]) == (0, 4.0, 4.5)
    assert (alarm["name"], alarm["step"], alarm["text"]) == ("mfu", 3, "too fast")
    times = [(e.get("seconds"), e.get("stall_s")) for e in events[7:11]]
    assert times == [(1.5, None), (None, 0.25), (0.5, None), (0.75, None)]
    assert events[7]["values"] == {"loss": 4.0} and events[14]["summary"] == {"tokens": 3072}


def test_a_listener_that_fails_is_dropped_with_one_warning(tmp_path, capsys):
    class Broken(Sink):
        def step(self, metrics):
            raise ValueError("no more")

        def finished(self, summary):
            raise AssertionError("it was dropped")

    path = tmp_path / "events.jsonl"
    tell_everything(Observer([Broken(), EventSink(EventLog(path))]))
    assert len(list(read_events(path))) == 15
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "Broken failed and is off: ValueError('no more')" in err


def test_without_listeners_it_is_silent(capfd):
    tell_everything(Observer())
    assert capfd.readouterr() == ("", "")
