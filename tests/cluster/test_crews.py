"""Crews: which nodes work on the next attempt; Ray is not asked here, nodes are made up."""

import pytest
from longspan.cluster.causes import Verdict
from longspan.errors import RunError
from longspan.trainer.observe.events import EventLog
from longspan.trainer.run_directory import create_or_open
from support.nodes import places
from support.tiny import tiny_run


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
    # A resume changes no setting.
    assert "add nodes, or mend those that are left out, and resume; a new run can be" in text
    assert text.endswith("submitted with a lower `ranks_at_least`, so that fewer do")


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


def test_a_driver_that_is_asked_to_stop_waits_no_longer(world):
    assert world(a=1).crews(tiny_run(ranks=2), wait=60.0).next(lambda: True) is None


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


def test_cores_stay_cores_where_submit_said_so(world):
    crew = world(a=(2, 8)).crews(tiny_run(ranks=4), device="cpu").next(lambda: False)
    assert not crew.gpu and crew.places == ("a",) * 4


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


def launched(world, run, **fields):
    log = EventLog(create_or_open(world.path, run, "tiny").events, 1)
    log.write("launched", ranks=4, **fields)
    log.close()


def test_who_resumes_without_a_record_waits_for_what_the_run_had(world):
    """The newest attempt tells; one of `longspan train` says nothing of a cluster."""
    world, run = world(a=(0, 16)), tiny_run()
    launched(world, run, device="gpu")
    launched(world, run)
    crews = world.crews(run, wait=60.0)
    grows = [lambda id=id: world.nodes.update({id: world.node(id, (2, 8))}) for id in "bc"]
    crew = crews.next(world.later(*grows))
    assert crew.gpu and crew.places == ("b", "b", "c", "c")
    assert world.crews(run, device="cpu", planned=2).planned == 2


def test_without_a_record_cores_stay_cores(world):
    world, run = world(a=(8, 8)), tiny_run(ranks=2)
    launched(world, run, device="cpu")
    assert not world.crews(run).next(lambda: False).gpu


def test_without_ranks_fewer_gpus_do_only_where_the_run_may_change(world):
    world, run = world(a=(2, 8)), tiny_run(checkpoint={"exactness": "E2"})
    with pytest.raises(RunError, match="wants 4 ranks") as caught:
        places(world.crews(run, device="gpu", planned=4))
    text = str(caught.value)
    assert text.endswith("resume with --exactness E1") and "ranks_at_least" not in text
    crews = world.crews(run, "E1", device="gpu", planned=4)
    assert places(crews) == ("a", "a")
    # Later attempts have as many; a new launch may have fewer.
    world.nodes["a"] = world.node("a", (1, 8))
    with pytest.raises(RunError, match="or resume now, with fewer ranks"):
        places(crews)


def test_without_ranks_there_is_no_other_number_on_cores(world):
    crews = world(a=1).crews(tiny_run(stage__parallel={"tensor": 2}), device="cpu")
    with pytest.raises(RunError, match=r"add nodes and resume$"):
        places(crews)
