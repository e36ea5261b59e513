"""Schedules of documents: properties, balance on data sets, and Megatron beside it."""

import importlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import longspan
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.errors import LongspanError
from longspan.parallel.schedule import DocumentCost, causal_pairs, schedule

RANKS, CAPACITY = 64, 8192
COSTS = {
    "pairs": DocumentCost(),
    "squares": DocumentCost(pairs=lambda n: n * n),
    "tokens": DocumentCost(pair=0, token=1),
    "both": DocumentCost(pair=1, token=40),
    "nothing": DocumentCost(pair=0),
}
LENGTHS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 120)), max_size=40)


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module; it imports megatron by way of the engine."""
    folder = str(Path(longspan.__file__).parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("schedule")
    finally:
        sys.path.remove(folder)


def parts_of(plan):
    """Parts of each document as (first, last), and the micro-batches that they are in."""
    parts, where = defaultdict(list), defaultdict(set)
    for number, ranks in enumerate(plan.micro_batches):
        for owned in ranks:
            for document, first, last in owned:
                parts[document].append((first, last))
                where[document].add(number)
    return parts, where


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(120, 200), st.sampled_from(list(COSTS)))
def test_every_token_is_computed_once_and_no_rank_holds_more_than_it_can(
    lengths, ranks, capacity, name
):
    plan = schedule(lengths, ranks, capacity, COSTS[name])
    parts, where = parts_of(plan)
    for document, length in enumerate(lengths):
        tokens = [t for first, last in parts[document] for t in range(first, last)]
        assert sorted(tokens) == list(range(length))
        assert len(where[document]) == (length > 0)
        assert all(first < last for first, last in parts[document])
    for micro_batch in plan.micro_batches:
        assert len(micro_batch) == ranks and any(micro_batch)
        for owned in micro_batch:
            assert sum(last - first for _, first, last in owned) <= capacity
    assert plan == schedule(tuple(lengths), ranks, capacity, COSTS[name])


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(120, 200), st.sampled_from(list(COSTS)))
def test_a_rank_waits_for_little_more_than_a_token(lengths, ranks, capacity, name):
    cost = COSTS[name]
    plan = schedule(lengths, ranks, capacity, cost)
    longest = max(lengths, default=0)
    most = cost(longest) - cost(longest - 1) if longest else 0
    for load in plan.loads(cost):
        assert max(load) <= 1.05 * sum(load) / ranks + most


def test_there_are_as_few_micro_batches_as_documents_allow():
    def count(*lengths):
        return len(schedule(lengths, 8, 8, COSTS["pairs"]).micro_batches)

    assert count(40, 24, 24, 40) == 2
    # Two hold all tokens only if they are exactly full.
    assert count(14, 34, 50, 30) == 2
    # Two would hold all tokens, but no two documents fit together.
    assert count(40, 40, 40) == 3


def test_micro_batches_hold_equally_many_tokens():
    plan = schedule([10] * 10, 8, 8, COSTS["tokens"])
    assert [sum(load) for load in plan.loads(COSTS["tokens"])] == [50, 50]


def test_a_rank_with_a_document_of_nearly_its_work_takes_little_else():
    lengths = [63, 62, 53, 35, 32, 32, 32, 30, 26, 8, 5, 5, 5, 4, 2, 2, 2, 2, 2, 1]
    (load,) = schedule(lengths, 4, 136, COSTS["pairs"]).loads(COSTS["pairs"])
    assert max(load) <= 1.03 * sum(load) / 4


def test_documents_of_similar_length_meet():
    plan = schedule([10, 60, 10, 50, 10, 10], 8, 15, COSTS["pairs"])
    assert parts_of(plan)[1] == {1: {0}, 3: {0}, 0: {0}, 2: {1}, 4: {1}, 5: {1}}


def test_a_long_document_lies_on_as_many_ranks_as_its_work_asks_for_and_short_ones_stay_whole():
    cost = COSTS["pairs"]
    lengths = [700] + [50] * 147
    share = 8 * cost(700) / (cost(700) + 147 * cost(50))
    degrees = schedule(lengths, 8, 8192, cost).degrees()
    # Not a power of two.
    assert 4 < share < 5 == degrees[0]
    assert sum(degree > 1 for degree in degrees.values()) == 1
    # Where ranks must be full, shorter parts of it share them with short documents.
    full = schedule(lengths, 8, sum(lengths) // 8 + 1, cost).degrees()
    assert full[0] == 8 and sum(degree > 1 for degree in full.values()) <= 8


def test_no_documents_make_no_micro_batches():
    assert schedule([], 4, 8, COSTS["pairs"]).micro_batches == ()
    assert schedule([0, 0], 4, 8, COSTS["pairs"]).balance(COSTS["pairs"]) == 1.0


@pytest.mark.parametrize("cost", ["squares", "both"])
@pytest.mark.parametrize(("per_rank", "least"), [(4, 0.8), (16, 0.95)])
@pytest.mark.parametrize("name", ["pile", "prolong64k", "prolong512k"])
def test_ranks_are_balanced_better_than_by_megatron(benchmark, name, per_rank, least, cost):
    for seed in (0, 4, 7):
        lengths = benchmark.draw(name, per_rank * RANKS, seed, RANKS * CAPACITY)
        plan = schedule(lengths, RANKS, CAPACITY, COSTS[cost])
        balance = plan.balance(COSTS[cost])
        groups = benchmark.megatron(lengths, RANKS, CAPACITY)
        assert balance >= least
        assert balance > benchmark.megatron_balance(groups, lengths, COSTS[cost])
        assert len(plan.micro_batches) == -(-sum(lengths) // (RANKS * CAPACITY))


def test_few_documents_are_cut_where_there_is_room(benchmark):
    lengths = benchmark.draw("prolong64k", 16 * RANKS, 3, RANKS * CAPACITY)
    plan = schedule(lengths, RANKS, CAPACITY, DocumentCost(pair=1, token=4096))
    cuts = sum(degree - 1 for degree in plan.degrees().values())
    assert cuts <= 1.1 * RANKS * len(plan.micro_batches)


def test_balance_is_the_work_of_the_mean_rank_by_that_of_the_slowest():
    plan = schedule([8, 1, 1], 1, 10, COSTS["tokens"])
    assert plan.balance(COSTS["tokens"]) == 1.0
    # Three tokens on two ranks: the slower one has two.
    assert schedule([3], 2, 2, COSTS["tokens"]).balance(COSTS["tokens"]) == 0.75


def test_a_cost_counts_pairs_and_tokens():
    assert DocumentCost(pair=2, token=3)(4) == 2 * 10 + 3 * 4
    assert DocumentCost(pair=2, pairs=lambda n: n)(4) == 8
    assert [causal_pairs(n) for n in range(4)] == [0, 1, 3, 6]


def test_a_document_that_nothing_holds_is_refused_with_a_fix():
    with pytest.raises(LongspanError, match="document 1 has 33 tokens") as error:
        schedule([3, 33], 4, 8, COSTS["pairs"])
    assert "5 ranks" in error.value.fix and "32 tokens" in error.value.fix


@pytest.mark.parametrize(("ranks", "capacity"), [(0, 8), (2, 0)])
def test_ranks_that_hold_nothing_are_refused(ranks, capacity):
    with pytest.raises(ValueError, match="cannot hold anything"):
        schedule([1], ranks, capacity, COSTS["pairs"])


def test_it_needs_no_torch():
    code = (
        "import sys; from longspan.parallel.schedule import DocumentCost, schedule; "
        "schedule([9], 2, 8, DocumentCost()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
