"""Crews: which nodes work on the next attempt; Ray is not asked here, nodes are made up."""

from types import SimpleNamespace

import pytest
from longspan.cluster import crews as module
from longspan.cluster import driver, growth
from longspan.cluster.causes import Verdict
from longspan.cluster.crews import Crews
from longspan.cluster.nodes import Node
from longspan.cluster.preflight.report import Report
from longspan.cluster.preflight.result import Result
from longspan.errors import RunError
from longspan.trainer.observe.events import EventLog, read_events
from longspan.trainer.run_directory import create_or_open
from support.tiny import tiny_run


class World:
    """Nodes as Ray would tell of them."""

    def __init__(self, monkeypatch, tmp_path, **nodes):
        self.nodes = {id: self.node(id, has) for id, has in nodes.items()}
        self.free, self.gone, self.said, self.asked = {}, set(), [], []
        self.path = tmp_path / "run"
        monkeypatch.setattr(module, "alive_nodes", lambda: tuple(self.nodes.values()))
        monkeypatch.setattr(module, "has_gone", lambda node: node.id in self.gone)
        monkeypatch.setattr(module, "free_slots", self.free_slots)
        monkeypatch.setattr(module, "_POLL_S", 0.01)
        monkeypatch.setattr(growth, "_request", lambda bundles: self.asked.append([*bundles]))

    def node(self, id, has):
        gpus, cores = has if isinstance(has, tuple) else (0, has)
        return Node(id, f"10.0.0.{ord(id)}", gpus, cores)

    def free_slots(self, gpu):
        return {id: self.free.get(id, node.slots(gpu)) for id, node in self.nodes.items()}

    def crews(self, run, consent=None, preflight=None, device=None, wait=0.05, planned=None):
        directory = create_or_open(self.path, run, "tiny")
        voice = SimpleNamespace(say=self.said.append)
        recovery = run.recovery.model_copy(update={"wait": wait})
        run = run.model_copy(update={"recovery": recovery})
        return Crews(run, directory, voice, consent, preflight, device, planned)

    def later(self, *changes):
        """While it is waited, each of these comes, one after the other; asks nobody to stop."""
        coming = iter(changes)

        def asked():
            if self.said:
                next(coming, lambda: None)()
            return False

        return asked

    def events(self):
        return [e for e in read_events(self.path / "events.jsonl") if e["event"] == "excluded"]


@pytest.fixture
def world(monkeypatch, tmp_path):
    return lambda **nodes: World(monkeypatch, tmp_path, **nodes)


def places(crews):
    return crews.next(lambda: False).places


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
    crews._run = crews._run.model_copy(update={"recovery": run.recovery})
    assert places(crews) == ("a", "a")  # it does not wait again, however long it might
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
        preflight=lambda nodes, _: {node.id: "disk full" for node in nodes if node.id == "a"},
    )
    with pytest.raises(RunError) as caught:
        places(crews)
    text = str(caught.value)
    assert "too few nodes after 0.05 s (recovery.wait): the run wants 8 ranks" in text
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
    assert crews.next(lambda: False).unit == 2
    assert places(crews) == ("a", "a", "b", "b")


def test_new_nodes_are_looked_at_once_and_what_fails_is_left_out(world):
    world, looked = world(a=2, b=2), []

    def preflight(nodes, beside):
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
    leader = driver.Driver(tiny_run(ranks=2), options, SimpleNamespace(say=world.said.append))
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
    directory = create_or_open(world.path, tiny_run(ranks=2), "tiny")
    options = driver.Options(run_id="tiny", run_dir=world.path, name="tiny")
    leader = driver.Driver(tiny_run(ranks=2), options, SimpleNamespace(say=world.said.append))
    found = [leader._look_at(directory, [world.node(id, 2)], []) for id in "abc"]
    assert [list(problems) for problems in found] == [["a"], [], []]
    assert asked == [None, None, {"torch": "2.2"}]


def test_a_driver_that_is_asked_to_stop_waits_no_longer(world):
    assert world(a=1).crews(tiny_run(ranks=2), wait=60.0).next(lambda: True) is None


def test_what_submit_decided_is_waited_for_and_a_cluster_that_grows_is_asked_once(world):
    """A head with cores enough is up first, and a GPU node while the run waits."""
    world = world(a=(0, 16))
    run = tiny_run(ranks=4, stage__parallel={"tensor": 2})
    crews = world.crews(run, device="gpu", wait=60.0)

    def grows():
        assert world.asked == [[{"CPU": 2, "GPU": 2}] * 2]
        world.nodes["b"] = world.node("b", (4, 8))

    crew = crews.next(world.later(lambda: None, grows))
    assert crew.gpu and crew.places == ("b",) * 4
    assert "the nodes have 0 free GPUs" in world.said[0] and "recovery.wait" in world.said[0]
    assert len(world.asked) == 1  # until the ranks are there the nodes must not go
    crews.settle()
    assert world.asked[1:] == [[]]
    crews.settle()
    assert len(world.asked) == 2


def test_without_ranks_as_many_as_submit_counted_are_waited_for(world):
    world = world(a=(2, 8))
    crews = world.crews(tiny_run(), device="gpu", planned=4, wait=60.0)
    grows = [lambda: None, lambda: world.nodes.update(b=world.node("b", (2, 8)))]
    assert crews.next(world.later(*grows)).places == ("a", "a", "b", "b")
    assert world.asked == [[{"CPU": 1, "GPU": 1}] * 4]
    # Where they do not come, those that are there do; and no more than were counted.
    del world.nodes["b"]
    assert places(world.crews(tiny_run(), device="gpu", planned=4)) == ("a", "a")
    world.nodes["a"] = world.node("a", (8, 8))
    assert places(world.crews(tiny_run(), device="gpu", planned=2)) == ("a", "a")


def test_what_others_use_or_is_left_out_is_asked_for_beside_the_gang(world):
    world = world(a=4, b=4, c=4)
    world.free = {"a": 1}
    crews = world.crews(tiny_run(ranks=8, stage__batch_tokens=8 * 64), device="cpu")
    crews.learn(Verdict("preemption", 1, None, ("b",)))
    with pytest.raises(RunError, match="5 free cores"):
        places(crews)
    assert world.asked == [[{"CPU": 1}] * 8 + [{"CPU": 3}, {"CPU": 4}]]


def test_cores_stay_cores_where_submit_said_so(world):
    crew = world(a=(2, 8)).crews(tiny_run(ranks=4), device="cpu").next(lambda: False)
    assert not crew.gpu and crew.places == ("a",) * 4


def test_a_cluster_without_an_autoscaler_does_not_mind(monkeypatch):
    import ray.autoscaler.sdk as sdk

    asked = []

    def refuse(bundles):
        asked.append(bundles)
        raise RuntimeError("no autoscaler")

    monkeypatch.setattr(sdk, "request_resources", refuse)
    wish = growth.Growth()
    wish.take_back()
    wish.ask([{"CPU": 1}])
    wish.take_back()
    assert asked == [[{"CPU": 1}], []]


def looks_of(world, looked):
    def preflight(nodes, beside):
        looked.append(([node.id for node in nodes], [node.id for node in beside]))
        return {}

    return preflight


def test_nodes_that_join_one_by_one_are_looked_at_together_and_later_ones_meet_them(world):
    world, looked = world(a=2), []
    crews = world.crews(tiny_run(ranks=4), preflight=looks_of(world, looked), wait=60.0)
    joins = [lambda: None, lambda: world.nodes.update(b=world.node("b", 2))]
    assert crews.next(world.later(*joins)).places == ("a", "a", "b", "b")
    assert looked == [(["a", "b"], [])]
    del world.nodes["b"]
    world.gone = {"b"}
    crews.learn(infrastructure("b"))
    world.nodes |= {"c": world.node("c", 1), "d": world.node("d", 2)}
    assert places(crews) == ("a", "a", "d", "d")
    assert looked[1:] == [(["c", "d"], ["a"])]
    # Not those that are at work for others, nor those that had a part in a failure.
    world.free = {"a": 1}
    crews.learn(infrastructure("d"))
    world.nodes["e"] = world.node("e", 4)
    assert places(crews) == ("e",) * 4
    assert looked[2:] == [(["e"], ["c"])]


def test_when_waiting_is_over_what_is_there_is_looked_at(world):
    world, looked = world(a=2), []
    with pytest.raises(RunError, match="too few nodes"):
        places(world.crews(tiny_run(ranks=4), preflight=looks_of(world, looked)))
    assert looked == [(["a"], [])]


def test_groups_are_split_only_after_a_wait_for_a_node_that_is_in_use(world):
    world = world(a=4, b=4)
    world.free = {"a": 2, "b": 2}
    run = tiny_run(ranks=4, stage__parallel={"tensor": 2, "context": 2})
    crew = world.crews(run).next(lambda: False)
    assert (crew.unit, crew.places) == (2, ("a", "a", "b", "b"))
    assert "waiting for nodes" in world.said[0]
