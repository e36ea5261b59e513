"""Who owns which tokens, against counts token by token."""

import importlib.util
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import longspan
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.attention.pairs import chosen, dense, ramp
from longspan.parallel.balance import balanced_chunks

PAIRS = {
    "dense": dense,
    "window": lambda n: ramp(n, 7),
    "chosen": lambda n: chosen(n, 4, 3),
    "linear": lambda n: n,
    "nothing": lambda n: 0,
}
LENGTHS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 300)), max_size=25)


def histogram():
    path = Path(longspan.__file__).parent / "benchmarks/histogram.py"
    spec = importlib.util.spec_from_file_location("histogram", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def boundaries(lengths):
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    return cu


def owners(cu, chunks):
    """The owner of each token; none has two."""
    owner = [None] * cu[-1]
    for rank, ranges in enumerate(chunks):
        for start, stop in ranges:
            assert owner[start:stop] == [None] * (stop - start)
            owner[start:stop] = [rank] * (stop - start)
    return owner


def loads(cu, chunks, pairs):
    """Pairs of each rank, and the most of one token, by looking at each token."""
    owner, load, most = owners(cu, chunks), [0.0] * len(chunks), 0
    for start, stop in pairwise(cu):
        for token in range(start, stop):
            work = pairs(token + 1 - start) - pairs(token - start)
            load[owner[token]] += work
            most = max(most, work)
    return load, most


def ranks_of(cu, chunks):
    """The ranks that own tokens of each document."""
    owner = owners(cu, chunks)
    return [sorted(set(owner[start:stop])) for start, stop in pairwise(cu)]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(list(PAIRS)))
def test_every_token_has_one_owner_and_ranks_own_equally_many(lengths, ranks, name):
    cu = boundaries(lengths)
    chunks = balanced_chunks(cu, ranks, PAIRS[name])
    owner = owners(cu, chunks)
    assert None not in owner and len(chunks) == ranks
    counts = Counter(owner)
    assert {counts[rank] for rank in range(ranks)} <= {cu[-1] // ranks, -(-cu[-1] // ranks)}
    for ranges in chunks:
        assert all(start < stop for start, stop in ranges)
        assert all(before[1] < after[0] for before, after in pairwise(ranges))
    assert chunks == balanced_chunks(tuple(cu), ranks, PAIRS[name])


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(list(PAIRS)))
def test_no_rank_has_5_percent_more_pairs_than_the_mean_and_a_token(lengths, ranks, name):
    cu = boundaries(lengths)
    load, most = loads(cu, balanced_chunks(cu, ranks, PAIRS[name]), PAIRS[name])
    assert max(load) <= 1.05 * sum(load) / ranks + most


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(list(PAIRS)))
def test_a_rank_cuts_at_most_two_documents(lengths, ranks, name):
    cu = boundaries(lengths)
    owner = owners(cu, balanced_chunks(cu, ranks, PAIRS[name]))
    inner = set(range(1, cu[-1])) - set(cu)
    assert sum(owner[token - 1] != owner[token] for token in inner) <= 2 * ranks


def documents_in(cu, start, stop):
    """The parts of documents in a range, counted from their document's start."""
    for begin, end in pairwise(cu):
        if begin < stop and start < end:
            yield max(start, begin) - begin, min(stop, end) - begin


@pytest.mark.parametrize("pairs", [dense, lambda n: ramp(n, 512)])
@pytest.mark.parametrize("name", ["pile", "prolong64k", "prolong512k"])
@pytest.mark.parametrize("ranks", [8, 63])
def test_documents_as_they_occur_are_balanced_within_5_percent(ranks, name, pairs):
    # Documents that no longer suffice to the end, and small ones that do not, occur in these.
    for seed in (0, 1, 5, 8, 22):
        cu = histogram().packed(name, ranks * 8192, seed)
        work = [
            sum(pairs(b) - pairs(a) for edge in ranges for a, b in documents_in(cu, *edge))
            for ranges in balanced_chunks(cu, ranks, pairs)
        ]
        assert max(work) <= 1.05 * sum(work) / ranks
        assert sum(work) == sum(pairs(stop - start) for start, stop in pairwise(cu))


def test_what_ranks_do_too_little_does_not_add_up_in_the_last_ones():
    cu = boundaries([400] * 51)
    load, _ = loads(cu, balanced_chunks(cu, 25, dense), dense)
    assert max(load) <= 1.04 * sum(load) / 25


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_one_document_is_cut_into_early_and_late_parts(ranks):
    chunks = balanced_chunks([0, 1 << 20], ranks, dense)
    assert all(len(ranges) <= 2 for ranges in chunks)
    work = [sum(dense(stop) - dense(start) for start, stop in ranges) for ranges in chunks]
    assert max(work) <= 1.05 * sum(work) / ranks


def test_equal_long_documents_share_no_rank():
    cu = boundaries([1600, 1600])
    first, second = ranks_of(cu, balanced_chunks(cu, 16, dense))
    assert sorted([first, second]) == [list(range(8)), list(range(8, 16))]


def test_documents_that_fit_stay_whole():
    cu = boundaries([50, 100, 150, 200, 250, 300] * 2 + [350] * 2)
    ranks = ranks_of(cu, balanced_chunks(cu, 4, lambda n: n))
    # Exactly full ranks need cuts, of one document each but for the last rank.
    assert sum(len(owning) - 1 for owning in ranks) <= 3


def test_documents_of_a_rank_s_work_stay_whole():
    # Each line is one rank's work; only what fills up ranks exactly is cut.
    long = [1000, *(900, 436), *(800, 600), *(707, 707), *(950, 312)]
    cu = boundaries(long + [30] * 60)
    ranks = ranks_of(cu, balanced_chunks(cu, 5, dense))
    assert [len(owning) for owning in ranks[: len(long)]] == [1] * len(long)


def test_long_documents_among_short_ones_lie_on_neighbouring_ranks():
    cu = boundaries([40] * 50 + [900, 850, 800] + [40] * 50)
    chunks = balanced_chunks(cu, 8, dense)
    owner, ranks = owners(cu, chunks), ranks_of(cu, chunks)
    for document in (50, 51, 52):
        start, stop = cu[document], cu[document + 1]
        late = sorted(set(owner[(start + stop) // 2 : stop]))
        assert late == list(range(late[0], late[0] + len(late))) and 2 <= len(late) <= 4
        # One range each: short documents fill up the ranks.
        assert sum(a != b for a, b in pairwise(owner[start:stop])) == len(ranks[document]) - 1
    # The others are whole, but for those that make a rank exactly full.
    assert sum(len(owning) > 1 for owning in ranks) <= 3 + 7


def test_pairs_are_asked_seldom_and_never_twice():
    asked: defaultdict[int, int] = defaultdict(int)

    def pairs(n):
        asked[n] += 1
        return dense(n)

    cu = histogram().packed("prolong64k", 64 * 8192, 0)
    balanced_chunks(cu, 64, pairs)
    assert set(asked.values()) == {1} and len(asked) < 40 * 64


@pytest.mark.parametrize("cu", [[], [1, 2], [0, 3, 2]])
def test_boundaries_that_do_not_ascend_from_0_are_refused(cu):
    with pytest.raises(ValueError, match="ascend from 0"):
        balanced_chunks(cu, 2, dense)


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="at least one rank"):
        balanced_chunks([0, 5], 0, dense)


def test_it_needs_no_torch():
    code = (
        "import sys; from longspan.parallel.balance import balanced_chunks; "
        "balanced_chunks([0, 9], 2, float); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
