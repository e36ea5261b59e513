"""What preflight measures: products of each device, all-reduces, and who is too slow to be used."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from longspan.cluster.preflight import bandwidth, devices, groups, network
from support.measuring_crew import MeasuringCrew, node


def level_of(results, node):
    (result,) = [result for result in results if result.node == node]
    return result.level, result.found


def gpu_node(**changes):
    device = {"name": "NVIDIA H100", "flops": 600e12, "right": True, "free": 79, "total": 80}
    card = {"index": "0", "name": "NVIDIA H100", "ecc": "0", "pending": "No"}
    card |= {key: changes.pop(key) for key in ("ecc", "pending") if key in changes}
    return {"gpus": 2, "devices": [device, {**device, **changes}], "cards": [card]}


GPU_CASES = {
    "healthy": ({}, "ok", "2 x NVIDIA H100, 600 TFLOP/s"),
    "wrong": ({"right": False, "flops": 1e12}, "fail", "GPU 1 multiplies wrongly"),
    "slow": ({"flops": 400e12}, "warn", "GPU 1 with 400 TFLOP/s"),
    "still a warning": ({"flops": 99e12}, "warn", "GPU 1 with 99 TFLOP/s"),
    "much too slow": ({"flops": 98e12}, "fail", "GPU 1 with 98 TFLOP/s"),
    "a part": ({"flops": 70e12, "name": "NVIDIA H100 MIG 1g.10gb"}, "ok", "2 x"),
    "unknown": ({"flops": 4e12, "name": "a GPU"}, "ok", "2 x"),
    "shared": ({"free": 60}, "warn", "GPU 1 with"),
    "taken": ({"free": 10}, "fail", "GPU 1 with"),
    "ECC": ({"ecc": "3"}, "fail", "GPU 0 with 3 uncorrected ECC errors"),
    "no ECC": ({"ecc": "[N/A]"}, "ok", "2 x"),
    "pages": ({"pending": "Yes"}, "warn", "memory pages"),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_gpus_are_judged_by_the_worst_that_was_found(name):
    changes, level, part = GPU_CASES[name]
    found = level_of(devices.judge({"a": gpu_node(**changes)}, {"a": 2}), "a")
    assert found[0] == level and part in found[1]


def test_fewer_gpus_than_ray_gives_away_and_a_crash_are_failures():
    found = devices.judge({"a": gpu_node(), "b": {"gpus": 0, "devices": [], "error": "segfault"}},
                          {"a": 3, "b": 2})  # fmt: skip
    assert [(r.level, r.found) for r in found] == [("fail", "2 GPUs"), ("fail", "segfault")]


def cpu_node(flops, core=5e9, right=True):
    device = {"name": "CPU", "flops": flops, "core_flops": core, "right": right}
    return {"gpus": 0, "devices": [device]}


def cpu_levels(nodes):
    return [result.level for result in devices.judge(nodes, dict.fromkeys(nodes, 0))]


def test_a_cpu_is_compared_with_the_others():
    nodes = {"a": cpu_node(9e9), "b": cpu_node(2e9), "c": cpu_node(8e9),
             "d": cpu_node(9e9, right=False)}  # fmt: skip
    assert cpu_levels(nodes) == ["ok", "warn", "ok", "fail"]


def test_a_core_that_is_much_slower_than_the_others_is_a_failure():
    nodes = {"a": cpu_node(9e9), "b": cpu_node(9e9, core=0.99e9), "c": cpu_node(9e9)}
    assert cpu_levels(nodes) == ["ok", "fail", "ok"]
    # A node with few cores is not slow, and of two one has to be nine times slower.
    assert cpu_levels({"a": cpu_node(90e9), "b": cpu_node(1e9), "c": cpu_node(90e9)})[1] == "warn"
    assert cpu_levels({"a": cpu_node(9e9), "b": cpu_node(9e9, core=0.56e9)}) == ["ok", "ok"]
    assert cpu_levels({"a": cpu_node(9e9), "b": cpu_node(9e9, core=0.55e9)}) == ["ok", "fail"]
    assert cpu_levels({"a": cpu_node(1e9, core=1.0)}) == ["ok"]


def test_gpus_that_ray_does_not_give_away_are_no_slow_cores():
    assert cpu_levels({"a": cpu_node(9e9), "b": gpu_node()}) == ["ok", "ok"]
    assert cpu_levels({"b": gpu_node()}) == ["ok"]


def test_this_node_multiplies():
    (found,) = devices.probe(60)["devices"]
    assert found["right"] and found["flops"] > 0 and found["core_flops"] > 0


def test_the_lines_of_nvidia_smi_are_read():
    text = "0, NVIDIA H100 80GB HBM3, 0, No\n1, NVIDIA H100 80GB HBM3, [N/A], [N/A]\nbroken\n"
    cards = devices.read_cards(text)
    assert [card["index"] for card in cards] == ["0", "1"]
    assert cards[1] == {"index": "1", "name": "NVIDIA H100 80GB HBM3", "ecc": "[N/A]",
                        "pending": "[N/A]"}  # fmt: skip


def test_ranks_that_come_together_measure_what_they_carry():
    port = network.free_port("127.0.0.1")
    groups = [bandwidth.Group("127.0.0.1", port, first, 1, 2) for first in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda group: bandwidth.probe(group, {}, 60), groups))
    assert all(part["bytes_per_s"] > 0 for part in found), found


def levels(where, speeds, gpu, ranks=None):
    nodes = {node: {"bytes_per_s": speed} for node, speed in speeds.items()}
    return [r.level for r in bandwidth.judge(where, nodes, gpu, ranks)]


def test_a_slow_all_reduce_is_a_warning_and_a_much_slower_one_a_failure():
    silent = {"a": {"error": "no answer"}, "b": {"bytes_per_s": 5e8}}
    assert [r.level for r in bandwidth.judge("between", silent, gpu=False)] == ["fail", "ok"]
    assert levels("inside", {"a": 1e9, "b": 1e9}, gpu=True) == ["warn", "warn"]
    assert levels("inside", {"a": 39e9, "b": 200e9, "c": 201e9}, gpu=True) == ["fail", "ok", "ok"]
    assert levels("inside", {"a": 41e9, "b": 200e9, "c": 201e9}, gpu=True) == ["warn", "ok", "ok"]
    # Nobody fails who is as fast as is expected, however fast the others are.
    assert levels("between", {"a": 2e8, "b": 9e9, "c": 9e9}, gpu=False) == ["ok", "ok", "ok"]
    # Of two, one has to be more than nine times slower; and a node with fewer ranks is another.
    assert levels("inside", {"a": 23e9, "b": 200e9}, gpu=True) == ["warn", "ok"]
    assert levels("inside", {"a": 22e9, "b": 200e9}, gpu=True) == ["fail", "ok"]
    ranks = {"a": 2, "b": 8}
    assert levels("inside", {"a": 2e9, "b": 200e9}, gpu=True, ranks=ranks) == ["warn", "ok"]


def test_a_rank_that_stays_alone_fails_in_time():
    alone = bandwidth.Group("127.0.0.1", network.free_port("127.0.0.1"), 0, 1, 2)
    assert bandwidth.probe(alone, {}, 4) == {"error": "no answer within 4 s"}
    nowhere = bandwidth.Group("127.0.0.1", network.free_port("127.0.0.1"), 0, 1, 1)
    assert "nope0" in bandwidth.probe(nowhere, {"GLOO_SOCKET_IFNAME": "nope0"}, 30)["error"]


def failed_in(crew):
    return [r.node for r in groups.measure(crew, crew.present) if r.level == "fail"]


def test_pairs_tell_which_node_spoils_the_group():
    nodes = [node(number) for number in range(1, 6)]
    assert failed_in(MeasuringCrew(nodes, set())) == []
    crew = MeasuringCrew(nodes, {nodes[1].name})
    assert failed_in(crew) == [nodes[0].name, nodes[1].name]
    assert [len(names) for names in crew.groups] == [2, 3]
    assert failed_in(MeasuringCrew(nodes[:2], {nodes[1].name})) == [nodes[0].name, nodes[1].name]


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_neighbours_tell_which_node_makes_all_of_them_slow(count):
    nodes = [node(number) for number in range(1, count + 1)]
    for slow in nodes:
        crew = MeasuringCrew(nodes, set(), slow=[slow.name])
        assert failed_in(crew) == [slow.name]
        assert crew.rounds == 1 + (3 if count % 2 else 2)


def test_of_two_nodes_nobody_can_say_and_where_all_are_slow_nobody_fails():
    nodes = [node(number) for number in range(1, 6)]
    assert failed_in(MeasuringCrew(nodes[:2], set(), slow=[nodes[0].name])) == []
    assert failed_in(MeasuringCrew(nodes, set(), slow=[n.name for n in nodes])) == []
    quick = MeasuringCrew(nodes, set())
    assert failed_in(quick) == [] and quick.rounds == 1


def test_gpus_of_a_node_measure_alone_first_and_nodes_without_any_do_not():
    nodes = [node(1, gpus=8), node(2, gpus=8), node(3)]
    found = groups.measure(MeasuringCrew(nodes, set()), nodes)
    assert [(r.node, r.check) for r in found] == [
        (nodes[0].name, "bandwidth inside"), (nodes[1].name, "bandwidth inside"),
        (nodes[0].name, "bandwidth between"), (nodes[1].name, "bandwidth between"),
    ]  # fmt: skip
    assert failed_in(MeasuringCrew(nodes, {nodes[0].name})) == [nodes[0].name]


def test_without_time_nothing_is_measured_and_nobody_is_blamed():
    nodes = [node(1), node(2)]
    found = groups.measure(MeasuringCrew(nodes, set(), left=3.0), nodes)
    assert [result.level for result in found] == ["warn", "warn"]
