"""Crews: which nodes work on the next attempt; Ray is not asked here, nodes are made up."""

from types import SimpleNamespace

import pytest
from longspan.cluster import crews as module
from longspan.cluster import driver
from longspan.cluster.causes import Verdict
from longspan.cluster.crews import Crews
from longspan.cluster.nodes import Node
from longspan.cluster.preflight.report import Report
from longspan.errors import RunError
from longspan.trainer.observe.events import EventLog, read_events
from longspan.trainer.run_directory import create_or_open
from support.tiny import tiny_run


class World:
    """Nodes as Ray would tell of them."""

    def __init__(self, monkeypatch, tmp_path, **nodes):
        self.nodes = {id: self.node(id, has) for id, has in nodes.items()}
        self.free, self.gone, self.said = {}, set(), []
        self.path = tmp_path / "run"
        monkeypatch.setattr(module, "alive_nodes", lambda: tuple(self.nodes.values()))
        monkeypatch.setattr(module, "has_gone", lambda node: node.id in self.gone)
        monkeypatch.setattr(module, "free_slots", self.free_slots)
        monkeypatch.setattr(module, "_POLL_S", 0.01)

    def node(self, id, has):
        gpus, cores = has if isinstance(has, tuple) else (0, has)
        return Node(id, f"10.0.0.{ord(id)}", gpus, cores)

    def free_slots(self, gpu):
        return {id: self.free.get(id, node.slots(gpu)) for id, node in self.nodes.items()}

    def crews(self, run, consent=None, preflight=None):
        directory = create_or_open(self.path, run, "tiny")
        voice = SimpleNamespace(say=self.said.append)
        return Crews(run, directory, voice, consent, preflight)

    def events(self):
        return [e for e in read_events(self.path / "events.jsonl") if e["event"] == "excluded"]


@pytest.fixture
def world(monkeypatch, tmp_path):
    return lambda **nodes: World(monkeypatch, tmp_path, **nodes)


def places(crews, wait=0.05):
    return crews.next(wait, lambda: False).places


def infrastructure(*nodes):
    return Verdict("infrastructure", 1, None, nodes)


def test_a_lost_node_stays_out_also_of_later_launches(world):
    world = world(a=2, b=2, c=2)
    run = tiny_run(ranks=4)
    crews = world.crews(run)
    assert places(crews) == ("a", "a", "b", "b")
    world.gone = {"a"}  # Ray does not know yet
    crews.learn(infrastructure("a"))
    assert places(crews) == ("b", "b", "c", "c")
    assert [(e["node"], e["kind"]) for e in world.events()] == [("a", "lost")]
    assert places(world.crews(run)) == ("b", "b", "c", "c")


def test_a_node_that_is_taken_away_is_left_while_it_is_there(world):
    world = world(a=2, b=2)
    crews = world.crews(tiny_run(ranks=2))
    crews.learn(Verdict("preemption", 1, None, ("a",)))
    assert places(crews) == ("b", "b") and "is taken away" in world.said[0]


def test_a_node_with_two_failures_rests_while_others_are_enough(world):
    world = world(a=2, b=2, c=2)
    crews = world.crews(tiny_run(ranks=4))
    crews.learn(infrastructure("b"))
    assert places(crews) == ("a", "a", "b", "b")
    crews.learn(infrastructure("b"))
    assert places(crews) == ("a", "a", "c", "c")
    del world.nodes["c"]
    assert places(crews) == ("a", "a", "b", "b")
    # A later launch gives it another chance: it may have been mended.
    assert places(world.crews(tiny_run(ranks=4))) == ("a", "a", "b", "b")


def test_what_others_use_is_waited_for(world):
    world = world(a=2, b=2)
    world.free = {"a": 0, "b": 1}
    crews = world.crews(tiny_run(ranks=2))
    with pytest.raises(RunError, match=r"wants 2 ranks, the nodes have 1 free cores"):
        places(crews)
    world.free = {"a": 0}
    assert places(crews) == ("b", "b")


def test_fewer_ranks_do_after_a_wait_where_exactness_allows_it(world):
    world = world(a=2, b=1)
    run = tiny_run(ranks=4, ranks_at_least=1)
    EventLog((create_or_open(world.path, run, "tiny")).events, 1).write(
        "run_started", exactness={"level": "E2"}
    )
    with pytest.raises(RunError, match="--exactness E1"):
        places(world.crews(run))
    crews = world.crews(run, consent="E1")
    # Of four sequences a step, three ranks could not have as many each.
    assert places(crews) == ("a", "a")
    assert sum("waiting" in text for text in world.said) == 2
    assert places(crews, wait=60.0) == ("a", "a")  # it does not wait again
    world.nodes["c"] = world.node("c", 2)
    assert places(crews) == ("a", "a", "c", "c")


def test_the_recipe_can_allow_it_and_without_a_range_more_nodes_are_asked_for(world):
    world = world(a=2)
    with pytest.raises(RunError, match="ranks_at_least"):
        places(world.crews(tiny_run(ranks=4)))


def test_the_fewest_ranks_may_be_too_many_too_and_nodes_that_are_left_out_can_be_mended(world):
    world = world(a=2, b=2)
    crews = world.crews(
        tiny_run(ranks=8, ranks_at_least=4, checkpoint={"exactness": "E1"}),
        preflight=lambda nodes: {node.id: "disk full" for node in nodes if node.id == "a"},
    )
    with pytest.raises(RunError) as caught:
        places(crews)
    text = str(caught.value)
    assert "wants 8 ranks, 4 at least, the nodes have 2 free cores; left out: " in text
    assert "failed preflight: disk full" in text
    assert "add nodes, or mend those that are left out, and resume, or lower" in text


def test_without_ranks_each_gpu_has_one_and_later_attempts_as_many(world):
    world = world(a=(4, 8), b=(3, 8), c=32)
    crews = world.crews(tiny_run())
    assert places(crews) == ("a",) * 4  # seven do not divide a step's four sequences
    world.nodes["a"] = world.node("a", (2, 8))
    del world.nodes["b"]
    with pytest.raises(RunError, match="wants 4 ranks, the nodes have 2 free GPUs"):
        places(crews)
    world.nodes = {"c": world.nodes["c"]}
    with pytest.raises(RunError, match="0 free GPUs"):
        places(crews)


def test_groups_stay_inside_of_nodes(world):
    world = world(a=3, b=3)
    crews = world.crews(tiny_run(ranks=4, stage__parallel={"tensor": 2}))
    assert crews.next(0, lambda: False).unit == 2
    assert places(crews) == ("a", "a", "b", "b")


def test_new_nodes_are_looked_at_once_and_what_fails_is_left_out(world):
    world, looked = world(a=2, b=2), []

    def preflight(nodes):
        looked.append([node.id for node in nodes])
        return {node.id: "disk full" for node in nodes if node.id == "a"}

    crews = world.crews(tiny_run(ranks=2), preflight=preflight)
    assert places(crews) == ("b", "b") == places(crews)
    world.nodes["c"] = world.node("c", 4)
    assert places(crews) == ("c", "c")
    assert looked == [["a", "b"], ["c"]]
    assert "failed preflight: disk full" in world.said[0]
    again = world.crews(tiny_run(ranks=2), preflight=preflight)
    places(again)
    assert looked[2] == ["a", "b", "c"]  # a later launch looks again


def test_nodes_that_come_later_have_to_be_like_those_that_came_first(world, monkeypatch):
    world, asked = world(a=2), []

    def preflight(nodes, *_, like, **__):
        asked.append(like)
        return Report(nodes, [], 0.1, {"torch": f"2.{len(asked)}"})

    monkeypatch.setattr(driver, "preflight", preflight)
    directory = create_or_open(world.path, tiny_run(ranks=2), "tiny")
    options = driver.Options(run_id="tiny", run_dir=world.path, name="tiny")
    leader = driver.Driver(tiny_run(ranks=2), options, SimpleNamespace())
    for node in (world.node("a", 2), world.node("b", 2)):
        assert leader._look_at(directory, [node]) == {}
    assert asked == [None, {"torch": "2.1"}]


def test_a_driver_that_is_asked_to_stop_waits_no_longer(world):
    assert world(a=1).crews(tiny_run(ranks=2)).next(60.0, lambda: True) is None
