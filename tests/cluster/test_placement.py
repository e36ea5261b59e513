"""Placement: where ranks go; and nodes: what one that is gone looks like."""

import socket

from hypothesis import given
from hypothesis import strategies as st
from longspan.cluster.nodes import Node, has_gone
from longspan.cluster.placement import group_of, misplaced, place, split_groups, unit_of
from support.tiny import tiny_run


def test_a_node_takes_a_rank_for_each_gpu_or_each_core():
    both, cores = Node("a", "x", gpus=8, cores=16), Node("b", "y", gpus=0, cores=4)
    assert [(node.slots(True), node.slots(False)) for node in (both, cores)] == [(8, 16), (0, 4)]


def test_few_nodes_are_taken_and_groups_stay_inside_of_them():
    assert place({"a": 3, "b": 4}, 4, 2) == ("b",) * 4
    assert place({"a": 3, "b": 3}, 4, 2) == ("a", "a", "b", "b")
    assert place({"a": 3, "b": 3}, 6, 2) is None
    assert place({"a": 3, "b": 3}, 6, 1) == ("a",) * 3 + ("b",) * 3
    assert place({}, 1, 1) is None


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 9)),
       st.integers(1, 4), st.integers(1, 8))  # fmt: skip
def test_places_are_right_wherever_there_is_room(slots, unit, groups):
    found = place(slots, groups * unit, unit)
    room = sum(free // unit for free in slots.values())
    assert (found is not None) == (room >= groups)
    if found is not None:
        assert len(found) == groups * unit and not misplaced(found, unit)
        assert not misplaced(found, 1)
        assert all(found.count(node) <= slots[node] for node in found)


def test_a_group_that_no_node_has_room_for_keeps_its_tensor_ranks_together():
    run = tiny_run(stage__parallel={"tensor": 2, "context": 4})
    assert (unit_of(run, 8), unit_of(run, 7), unit_of(run, 1)) == (8, 2, 2)


def test_a_group_that_is_split_is_told_of_by_its_name():
    run = tiny_run(stage__parallel={"tensor": 2, "context": 4})
    assert split_groups(run, 8) == "" and group_of(run, 8) == "tensor x context group"
    told = split_groups(run, 2)
    assert "group of 8 ranks: it is split over nodes" in told and "2 (tensor)" in told
    assert group_of(run, 2) == "tensor group"
    assert "ranks 2 to 3, a tensor group," in misplaced(["a", "a", "a", "b"], 2, group_of(run, 2))
    alone = tiny_run(stage__parallel={"tensor": 2})
    assert split_groups(alone, unit_of(alone, 1)) == ""


def test_ranks_are_ordered_by_node_also_where_none_have_to_be_together():
    assert misplaced(["a", "b", "c"], 1) == "" == misplaced(["a", "a", "b"], 1)
    told = misplaced(["a", "b", "b", "a"], 1)
    assert told.startswith("ranks 0 and 3 are on node a") and "between them" in told
    assert misplaced(["b", "a", "a", "b", "c"], 1).startswith("ranks 0 and 3 are on node b")


def test_a_node_is_gone_when_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = Node("a", "127.0.0.1", gpus=0, cores=1, port=server.getsockname()[1])
        assert not has_gone(node)
    assert has_gone(node)
