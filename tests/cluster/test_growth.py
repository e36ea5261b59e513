"""Growth: what a cluster that can grow is asked for, and when; nodes are made up."""

import pytest
from longspan.cluster import growth
from longspan.cluster.causes import Verdict
from longspan.errors import RunError
from support.nodes import Clock, places
from support.tiny import tiny_run


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


def test_what_others_use_or_is_left_out_is_asked_for_beside_the_gang(world):
    world = world(a=4, b=4, c=4)
    world.free = {"a": 1}
    crews = world.crews(tiny_run(ranks=8, stage__batch_tokens=8 * 64), device="cpu")
    crews.learn(Verdict("preemption", 1, None, ("b",)))
    with pytest.raises(RunError, match="5 free cores"):
        places(crews)
    assert world.asked == [[{"CPU": 1}] * 8 + [{"CPU": 3}, {"CPU": 4}]]


def test_a_group_is_asked_for_whole_before_any_node_is_up(world):
    """As large as the nodes that submit knew of; a smaller one that is up first does not do."""
    world = world(a=(2, 8), b=(2, 8))
    run = tiny_run(ranks=4, stage__parallel={"tensor": 2, "context": 2})
    crews = world.crews(run, device="gpu", slots=4, wait=60.0)
    grows = [lambda: None, lambda: world.nodes.update(c=world.node("c", (4, 8)))]
    crew = crews.next(world.later(*grows))
    assert (crew.unit, crew.places) == (4, ("c",) * 4)
    assert world.asked == [[{"CPU": 4, "GPU": 4}]]
    # Where it does not come, groups are split.
    del world.nodes["c"]
    assert world.crews(run, device="gpu", slots=4).next(lambda: False).unit == 2


def test_a_request_for_nodes_is_renewed_while_they_are_waited_for(world, monkeypatch):
    """Another run's request would replace it, and somebody may take nodes meanwhile."""
    world = world(a=2)
    crews = world.crews(tiny_run(ranks=4), device="cpu", wait=40.0)
    clock = Clock(monkeypatch)

    def asked():
        world.free = {"a": 0} if clock.now > 1010 else {}
        return False

    with pytest.raises(RunError, match="too few nodes after 40 s"):
        crews.next(asked)
    gang = [{"CPU": 1}] * 4
    assert world.asked == [gang, [*gang, {"CPU": 2}], [*gang, {"CPU": 2}]]


def test_a_node_that_is_left_out_is_asked_for_at_once_and_a_look_is_no_waiting(world, monkeypatch):
    world, clock = world(a=2), Clock(monkeypatch)

    def preflight(nodes, beside):
        clock.now += 5.0
        return {node.id: "disk full" for node in nodes if node.id == "b"}

    def asked():
        if clock.now == 1032.0:
            world.nodes["b"] = world.node("b", 2)
        if clock.now == 1044.0:  # the look took the time that was left
            world.nodes["c"] = world.node("c", 2)
        return False

    crews = world.crews(tiny_run(ranks=4), None, preflight, "cpu", wait=40.0)
    assert crews.next(asked).places == ("a", "a", "c", "c")
    gang = [{"CPU": 1}] * 4
    assert world.asked == [gang] * 3 + [[*gang, {"CPU": 2}]]


def test_what_a_driver_that_was_killed_asked_for_is_taken_back(world):
    world = world(a=2)
    crews = world.crews(tiny_run(ranks=2))
    places(crews)
    crews.settle()
    crews.settle()
    assert world.asked == [[]]


def test_a_cluster_without_an_autoscaler_does_not_mind(monkeypatch):
    import ray.autoscaler.sdk as sdk

    asked = []

    def refuse(bundles):
        asked.append(bundles)
        raise RuntimeError("no autoscaler")

    monkeypatch.setattr(sdk, "request_resources", refuse)
    wish = growth.Growth()
    wish.take_back()  # what a driver that was killed asked for
    wish.take_back()
    wish.ask([{"CPU": 1}])
    wish.take_back()
    assert asked == [[], [{"CPU": 1}], []]
