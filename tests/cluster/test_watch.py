"""Watch: hangs, stragglers and places of a gang, and what it costs with a thousand workers."""

import asyncio

from longspan.cluster.gang import seconds_between_polls
from longspan.cluster.placement import misplaced
from longspan.cluster.watch import End, NodeReport, Overdue, Place, Watch, blamed

INTERVAL = 2.0


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def late(rank, step=5, state="S", silent=70.0):
    return Overdue(rank, "step", step, silent, 60.0, state)


def joined(ranks, per_node, unit=1, clock=None, hosts=None):
    """A watch whose ranks are all there, and what each was told."""

    async def join():
        watch = Watch(INTERVAL, clock or Clock())
        watch.begin(3, ranks, unit)
        places = [
            Place(rank, f"node-{rank // per_node}", (hosts or {}).get(rank, f"h{rank // per_node}"),
                  f"10.0.0.{rank // per_node}", 4000 + rank)
            for rank in range(ranks)
        ]  # fmt: skip
        told = await asyncio.gather(*(watch.join(3, place) for place in reversed(places)))
        return watch, told[::-1]

    return asyncio.run(join())


def test_ranks_learn_where_rank_0_listens_and_who_is_beside_them():
    _, told = joined(4, 2)
    assert [(a.local_rank, a.local_ranks, a.host_ranks) for a in told] == [
        (0, 2, 2), (1, 2, 2), (0, 2, 2), (1, 2, 2),
    ]  # fmt: skip
    assert {(a.address, a.port, a.problem, a.order) for a in told} == {
        ("10.0.0.0", 4000, "", "go on")
    }
    # Two nodes of one machine share its cores, and meet on loopback.
    _, told = joined(4, 2, hosts=dict.fromkeys(range(4), "one"))
    assert {(a.host_ranks, a.local_ranks, a.address) for a in told} == {(4, 2, "127.0.0.1")}


def test_a_group_that_is_on_two_nodes_is_told_to_every_rank():
    _, told = joined(4, 2, unit=4)
    assert all("ranks 0 to 3" in a.problem for a in told)
    assert misplaced(["a", "a", "b", "b"], 2) == "" and misplaced(["a", "b", "b", "a"], 2)


def test_who_belongs_to_an_earlier_attempt_is_told_to_end():
    async def stale():
        watch = Watch(INTERVAL, Clock())
        watch.begin(1, 2, 1)
        waiting = asyncio.create_task(watch.join(1, Place(0, "n", "h", "a", 1)))
        await asyncio.sleep(0)
        watch.begin(2, 2, 1)
        assert (await waiting).order == "end"
        assert watch.report(1, NodeReport("n")) == "end"
        watch.ended(1, 0, End(1, False))
        assert watch.news().ends == {}

    asyncio.run(stale())


def test_a_hang_is_told_after_all_nodes_were_heard_and_ends_once_the_stacks_are_there():
    clock = Clock()
    watch, _ = joined(4, 2, clock=clock)
    assert watch.report(3, NodeReport("node-0", 5, (late(0), late(1)))) == "go on"
    clock.now += INTERVAL
    assert watch.report(3, NodeReport("node-1", 5, (late(2), late(3, state="T")))) == "go on"
    clock.now += INTERVAL
    assert watch.report(3, NodeReport("node-0", 5, (late(0), late(1)))) == "dump"
    hang = watch.news().hang
    assert hang.overdue.rank == 3 and hang.node == "node-1" and "stopped" in hang.words
    assert watch.report(3, NodeReport("node-0", 5, dumped=True)) == "dump"
    assert watch.report(3, NodeReport("node-1", 5, dumped=True)) == "end"
    assert watch.report(3, NodeReport("node-0", 5, dumped=True)) == "end"


def test_a_rank_that_goes_on_in_time_is_no_hang():
    clock = Clock()
    watch, _ = joined(4, 2, clock=clock)
    for _ in range(5):
        assert watch.report(3, NodeReport("node-0", 5, (late(0),))) == "go on"
        clock.now += INTERVAL
        assert watch.report(3, NodeReport("node-0", 6)) == "go on"
        clock.now += INTERVAL
    assert watch.news().hang is None


def test_a_node_that_does_not_dump_is_not_waited_for_long():
    clock = Clock()
    watch, _ = joined(4, 2, clock=clock)
    for node in ("node-0", "node-1", "node-0"):
        watch.report(3, NodeReport(node, 5, (late(0),)))
        clock.now += INTERVAL
    assert watch.report(3, NodeReport("node-0", 5, dumped=True)) == "dump"
    clock.now += 31
    assert watch.report(3, NodeReport("node-0", 5, dumped=True)) == "end"


def test_a_node_that_is_not_heard_of_any_more_hangs():
    clock = Clock()
    watch, _ = joined(4, 2, clock=clock)
    for _ in range(40):
        clock.now += INTERVAL
        watch.report(3, NodeReport("node-0", 5))
    assert watch.news().hang.node == "node-1"


def test_the_rank_that_is_behind_is_to_blame_and_without_one_nobody_is():
    behind = [(late(0, step=6), "a"), (late(1, step=5), "b"), (late(2, step=6), "b")]
    assert (blamed(behind, []).overdue.rank, blamed(behind, []).node) == (1, "b")
    alike = [(late(0), "a"), (late(1, silent=90.0), "b")]
    assert (blamed(alike, []).overdue.rank, blamed(alike, []).node) == (1, "")


def test_a_straggler_is_told_once():
    watch, _ = joined(4, 2)
    told = []
    for step in range(20):
        watch.report(3, NodeReport("node-0", step, own_s={0: 1.0, 1: 1.1}))
        watch.report(3, NodeReport("node-1", step, own_s={2: 1.0, 3: 1.9}))
        told += watch.news().stragglers
    assert [(s.rank, s.node, s.own_s, s.typical_s) for s in told] == [(3, "node-1", 1.9, 1.0)]


def test_a_rank_that_is_slow_now_and_then_is_none():
    watch, _ = joined(4, 2)
    for number in range(40):
        slow = 1.9 if number % 5 else 1.0
        watch.report(3, NodeReport("node-0", number, own_s={0: 1.0, 1: 1.0}))
        watch.report(3, NodeReport("node-1", number, own_s={2: 1.0, 3: slow}))
    assert watch.news().stragglers == ()


def test_a_step_that_lasts_is_counted_once():
    watch, _ = joined(4, 2)
    for _ in range(40):
        watch.report(3, NodeReport("node-0", 7, own_s={0: 1.0, 1: 1.0}))
        watch.report(3, NodeReport("node-1", 7, own_s={2: 1.0, 3: 9.0}))
    assert watch.news().stragglers == ()


def test_with_a_thousand_workers_calls_grow_with_nodes_and_not_with_ranks_or_steps():
    minute = {}
    for ranks, per_node in ((1000, 8), (125, 1), (1000, 125)):
        clock = Clock()
        watch, _ = joined(ranks, per_node, clock=clock)
        begun, nodes = watch.calls, -(-ranks // per_node)
        assert begun == ranks  # one of each rank, once in an attempt
        for tick in range(30):
            clock.now += INTERVAL
            for node in range(nodes):
                mine = range(node * per_node, min(ranks, (node + 1) * per_node))
                # A hundred steps between two reports.
                own = dict.fromkeys(mine, 1.0)
                assert watch.report(3, NodeReport(f"node-{node}", 100 * tick, (), own)) == "go on"
            watch.news()
        minute[ranks, nodes] = watch.calls - begun
    assert minute == {(1000, 125): 30 * 126, (125, 125): 30 * 126, (1000, 8): 30 * 9}


def test_ray_train_itself_asks_more_workers_less_often():
    assert [seconds_between_polls(ranks) for ranks in (1, 200, 201, 1000)] == [1, 1, 2, 5]
