"""Attempts as the driver leads them: what it asks, says and writes; Ray is not there."""

from types import SimpleNamespace

import pytest
from longspan.cluster import driver
from longspan.cluster.causes import Verdict
from longspan.cluster.preflight.report import Report
from longspan.cluster.preflight.result import Result
from longspan.errors import RunError
from longspan.trainer.observe.events import read_events
from longspan.trainer.run_directory import create_or_open
from support.tiny import tiny_run


def led(world, run, **options):
    """A driver, and the run's folder."""
    directory = create_or_open(world.path, run, "tiny")
    options = driver.Options(run_id="tiny", run_dir=world.path, name="tiny", **options)
    return driver.Driver(run, options, SimpleNamespace(say=world.said.append)), directory


def test_nodes_that_come_later_have_to_be_like_those_that_came_first(world, monkeypatch):
    world, asked = world(a=2), []

    def preflight(nodes, *_, like, **__):
        asked.append(like)
        return Report(nodes, [], 0.1, {"torch": f"2.{len(asked)}"})

    monkeypatch.setattr(driver, "preflight", preflight)
    leader, directory = led(world, tiny_run(ranks=2))
    for node in (world.node("a", 2), world.node("b", 2)):
        assert leader._look_at(directory, [node], []) == {}
    assert asked == [None, {"torch": "2.1"}]


def test_where_every_node_of_a_look_failed_its_versions_are_no_law(world, monkeypatch):
    world, asked = world(a=2), []

    def preflight(nodes, *_, like, **__):
        asked.append(like)
        wrong = Result(nodes[0].name, "versions", "fail", "torch missing", "torch", "install it")
        return Report(nodes, [wrong] * (len(asked) == 1), 0.1, {"torch": f"2.{len(asked)}"})

    monkeypatch.setattr(driver, "preflight", preflight)
    leader, directory = led(world, tiny_run(ranks=2))
    found = [leader._look_at(directory, [world.node(id, 2)], []) for id in "abc"]
    assert [list(problems) for problems in found] == [["a"], [], []]
    assert asked == [None, None, {"torch": "2.2"}]


@pytest.fixture
def alone(monkeypatch):
    """No checkpoint, no watch, and a gang that ends as it is told."""
    how = SimpleNamespace(step=None, verdict=Verdict("complete", 0))
    monkeypatch.setattr(driver, "newest_step", lambda store: how.step)
    monkeypatch.setattr(driver.Driver, "_begin", lambda *_: None)
    monkeypatch.setattr(driver, "Gang", lambda *_: SimpleNamespace(run=lambda: how.verdict))
    return how


def events(directory, *names):
    return [event for event in read_events(directory.events) if event["event"] in names]


@pytest.mark.parametrize(("has", "device"), [((2, 4), "gpu"), (2, "cpu")])
def test_an_attempt_keeps_what_its_ranks_have(world, alone, has, device):
    leader, directory = led(world(a=has), tiny_run(ranks=2), preflight=False)
    assert leader._attempts(directory, None).cause == "complete"
    (event,) = events(directory, "launched")
    assert (event["ranks"], event["nodes"], event["device"]) == (2, ["a"], device)


@pytest.mark.parametrize("step", [None, 8])
def test_fewer_ranks_than_planned_lose_exactness_only_of_what_there_is(world, alone, step):
    alone.step, world = step, world(a=(2, 8))
    run = tiny_run(recovery={"wait": 0})
    leader, directory = led(world, run, device="gpu", ranks=4, preflight=False)
    leader._attempts(directory, None)
    exactness = ": exactness E1 (same data and schedule)" if step else ""
    assert f"2 of 4 ranks have to do{exactness}" in world.said


@pytest.mark.parametrize(("error", "code", "reason"), [
    (RunError("no disk", "mend it"), 2, "no disk"),
    (KeyError("who"), 1, "KeyError: 'who'"),
])  # fmt: skip
def test_an_attempt_that_the_driver_breaks_off_is_ended(
    world, alone, monkeypatch, error, code, reason
):
    def breaks(*_):
        raise error

    monkeypatch.setattr(driver, "Gang", breaks)
    leader, directory = led(world(a=2), tiny_run(ranks=2), preflight=False)
    with pytest.raises(type(error)):
        leader._attempts(directory, None)
    (event,) = events(directory, "ended")
    assert (event["code"], event["how"], event["reason"]) == (code, "failed", reason)
