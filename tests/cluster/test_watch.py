"""Watch: hangs, stragglers and places of a gang, and what it costs with a thousand workers."""

import asyncio

from longspan.cluster import watch as module
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
    assert all("ranks 0 to 3, a tensor x context group" in a.problem for a in told)
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


def last_words(watch, clock, *happens):
    """How long the end of a gang is put off while this happens, half a second apart."""

    async def waits():
        told = asyncio.create_task(watch.last_words(3))
        begun = clock.now
        await asyncio.sleep(0)
        for happening in happens:
            if told.done():
                break
            happening()
            clock.now += 0.5
            await asyncio.sleep(0.02)
        while not told.done():
            clock.now += 0.5
            await asyncio.sleep(0.02)
        return clock.now - begun

    return asyncio.run(waits())


def failing(monkeypatch, code):
    """Three nodes of two ranks, of which rank 3 has ended."""
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    clock = Clock()
    watch, _ = joined(6, 2, clock=clock)
    for node in range(3):
        watch.report(3, NodeReport(f"node-{node}", 5))
    watch.ended(3, 3, End(code))
    return watch, clock


def test_where_a_rank_fails_the_others_show_where_they_are_before_they_are_ended(monkeypatch):
    watch, clock = failing(monkeypatch, -9)
    assert watch.report(3, NodeReport("node-0", 5)) == "dump"  # before Ray Train has noticed
    told = []

    def dumps(node):
        told.append(watch.report(3, NodeReport(node, 5, dumped=True)))

    took = last_words(
        watch, clock, *(lambda n=n: dumps(f"node-{n}") for n in range(3)), lambda: dumps("node-0")
    )
    assert told == ["dump"] * 3 and took == 1.5  # and are not told to end
    assert watch.news().hang is None


def test_nodes_that_are_gone_or_too_slow_hold_nothing_up(monkeypatch):
    watch, clock = failing(monkeypatch, 1)
    again = [lambda: watch.report(3, NodeReport("node-0", 5))] * 20
    assert last_words(watch, clock, *again) == module._LAST_DUMP_S
    # Node 1 is lost: nothing was heard of it since, and Ray has found out by itself.
    watch, clock = failing(monkeypatch, 75)
    clock.now += 2 * INTERVAL + 2
    for node in (0, 2):
        watch.report(3, NodeReport(f"node-{node}", 5, dumped=True))
    assert last_words(watch, clock) <= 0.5
    # The rank that tells of a node has ended: it has seen to the others there.
    watch, clock = failing(monkeypatch, -9)
    watch.ended(3, 2, End(1))
    for node in (0, 2):
        watch.report(3, NodeReport(f"node-{node}", 5, dumped=True))
    assert last_words(watch, clock) <= 0.5


def test_a_lost_node_has_the_others_dump_without_a_word_of_its_own(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    clock = Clock()
    watch, _ = joined(4, 2, clock=clock)
    watch.report(3, NodeReport("node-0", 5))
    told = []
    dumps = [lambda: told.append(watch.report(3, NodeReport("node-0", 5, dumped=len(told) > 0)))]
    assert last_words(watch, clock, *dumps * 2) == 1.0 and told == ["dump", "dump"]


def test_users_errors_and_good_ends_are_not_held_up(monkeypatch):
    for codes in ((2, 1), (0, 0), (75, 75), (75, 130)):
        clock = Clock()
        watch, _ = joined(2, 1, clock=clock)
        watch.report(3, NodeReport("node-0", 5))
        for rank, code in enumerate(codes):
            watch.ended(3, rank, End(code))
        assert last_words(watch, clock) == 0
    watch, clock = failing(monkeypatch, 2)
    assert watch.report(3, NodeReport("node-0", 5)) == "go on"
    assert last_words(watch, clock) == 0


def test_a_hang_names_the_setting_and_what_took_long_is_kept():
    clock = Clock()
    watch, _ = joined(2, 1, clock=clock)
    slow = Overdue(1, "save", 5, 70.0, 60.0, "S", "recovery.hang.first")
    words = blamed([(slow, "node-1")], []).words
    assert "longer than the 60 s that it may take (recovery.hang.first)" in words
    watch.report(3, NodeReport("node-0", 5, longest={"step 0": 2.0, "canary 0": 1.0}))
    watch.report(3, NodeReport("node-1", 5, longest={"step 0": 3.0}))
    assert watch.news().longest == {"step 0": 3.0, "canary 0": 1.0}


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
