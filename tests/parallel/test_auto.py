"""Which exchange is predicted to be the fastest."""

from dataclasses import replace

import pytest
from longspan.parallel.auto import GPU, Work, predict
from longspan.parallel.volume import Call, volume_of


def work(
    ranks,
    heads=32,
    groups=8,
    tokens=8192,
    reached=0.75,
    pairs=None,
    cutting=0.3,
    busiest=lambda parts: 1.0,
):
    pairs = heads * (tokens * ranks) ** 2 / 2 / ranks if pairs is None else pairs
    call = Call(heads, groups, 128, 128, 2)
    return Work([tokens] * ranks, call, pairs, busiest, reached, cutting)


def names(work, node=8):
    return [prediction.candidate.kind for prediction in predict(work, node, GPU)]


def test_heads_are_the_limit_of_ulysses():
    assert "ulysses" in names(work(32))
    assert "ulysses" not in names(work(64))
    assert "two_d" in names(work(64))


def test_nodes_matter_only_where_there_are_several():
    assert not {"double_ring", "two_d"} & set(names(work(8)))
    assert {"double_ring", "two_d"} <= set(names(work(16)))
    assert not {"double_ring", "two_d"} & set(names(work(12)))  # no whole nodes


def test_a_window_is_fetched():
    # 1,024 keys of each neighbour are a sixtieth of all.
    pairs = 32 * 8192 * 1024
    assert names(work(16, reached=2 * 1024 / (15 * 8192), pairs=pairs))[0] == "fetch"


def test_inside_of_a_node_dense_attention_is_not_cut_up():
    assert names(work(8, tokens=65536))[0] in ("ulysses", "all_gather")


def test_many_key_value_heads_hide_an_all_gather_and_one_does_not():
    waits = {}
    for groups in (1, 8):
        given = work(8, groups=groups, tokens=65536)
        found = {p.candidate.kind: p for p in predict(given, 8, GPU)}["all_gather"]
        travelling = sum(volume_of("all_gather", given.sizes, 0, given.call)) / GPU.inside
        waits[groups] = (found.waiting - 3 * 8 * GPU.latency) / travelling
    # One head's keys must all be there before anything can be computed.
    assert waits[1] == pytest.approx(1)
    assert waits[8] == pytest.approx(1 / 8)


def test_all_wait_for_the_busiest_rank():
    """Of contiguous parts of tokens the last one sees most; heads are shared evenly."""
    uneven = work(8, tokens=65536, busiest=lambda parts: 2 - 1 / parts)
    assert names(uneven)[0] == "ulysses"
    seconds = {p.candidate.kind: p.seconds for p in predict(uneven, 8, GPU)}
    assert seconds["all_gather"] > 1.8 * seconds["ulysses"]
    # 32 heads over 24 ranks: 8 ranks have two.
    few = {p.candidate.kind: p.seconds - p.waiting for p in predict(work(24), 24, GPU)}
    assert few["ulysses"] == pytest.approx(1.5 * few["all_gather"])


def test_predictions_are_sorted_and_never_below_computing():
    found = predict(work(16), 8, GPU)
    assert found == sorted(found, key=lambda each: each.seconds)
    assert all(each.waiting >= 0 and each.seconds > each.waiting for each in found)


def test_twice_the_wire_waits_longer():
    slow = predict(work(16, pairs=1.0), 8, GPU)
    wide = replace(work(16, pairs=1.0), call=Call(32, 8, 128, 128, 4))
    waits = {p.candidate: p.waiting for p in slow}
    for prediction in predict(wide, 8, GPU):
        assert prediction.waiting > waits[prediction.candidate]
