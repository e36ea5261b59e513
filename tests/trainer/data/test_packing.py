from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.trainer.data import packing
from longspan.trainer.data.packing import Packing, epoch_order, pack_once
from reference.packing import naive_parts, naive_sequences


def expand(pieces):
    return [(d, start + i) for d, start, length in pieces for i in range(length)]


def some_lengths(count, seed=0, largest=60):
    return np.random.default_rng(seed).integers(1, largest, count)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    sequence_length=st.integers(1, 24),
    look_ahead=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_equals_the_naive_packing(lengths, sequence_length, look_ahead, seed):
    lengths = np.array(lengths)
    whole = 3 * int(lengths.sum()) // sequence_length
    parts = naive_parts(lengths, sequence_length)
    orders = [epoch_order(len(parts), seed, "s", epoch).tolist() for epoch in range(3)]
    expected = naive_sequences(parts, sequence_length, orders, look_ahead)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOK_AHEAD", look_ahead)
        packed = Packing(lengths, sequence_length, seed=seed, stage="s", sequences=whole)
        assert [expand(packed[i]) for i in range(whole)] == expected[:whole]
        once = pack_once(lengths, sequence_length)
    naive = naive_sequences(parts, sequence_length, [range(len(parts))], look_ahead)
    assert [expand(pieces) for pieces in once] == naive


def test_every_token_once_per_epoch_and_no_gap_between_epochs():
    lengths = some_lengths(700, largest=300)
    total = int(lengths.sum())
    packed = Packing(lengths, 128, seed=5, stage="s", sequences=3 * total // 128)
    stream = [token for pieces in packed for token in expand(pieces)]
    assert len(stream) == len(packed) * 128
    tokens = [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    for epoch in range(2):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == tokens


def test_the_order_does_not_depend_on_how_much_is_asked_for():
    lengths = some_lengths(500)
    few = Packing(lengths, 64, seed=1, stage="s", sequences=10)
    many = Packing(lengths, 64, seed=1, stage="s", sequences=2000)
    backwards = {i: many[i] for i in reversed(range(2000))}
    assert [few[i] for i in range(10)] == [backwards[i] for i in range(10)]
    assert len(few) == 10
    with pytest.raises(IndexError):
        few[10]


def test_seed_stage_and_epoch_each_change_the_order():
    orders = [
        epoch_order(50, *key).tolist()
        for key in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_the_same_on_every_machine_and_for_ever():
    assert epoch_order(10, 1234, "short", 0).tolist() == GOLDEN


GOLDEN = [6, 2, 8, 7, 0, 4, 1, 9, 3, 5]


def test_parts_of_a_long_document_are_spread_over_the_epoch():
    packed = Packing(np.array([20_000, *[100] * 800]), 100, seed=0, stage="s", sequences=1000)
    at = [i for i, pieces in enumerate(packed) if pieces[0].document == 0]
    assert len(at) == 200
    neighbours = sum(after - before == 1 for before, after in pairwise(at))
    # A fifth of the sequences, so that about a fifth are followed by another one.
    assert neighbours < 80


def test_documents_that_fit_stay_whole_where_they_can():
    lengths = some_lengths(2000, largest=64)
    packed = Packing(lengths, 256, seed=0, stage="s", sequences=int(lengths.sum()) // 256)
    split = sum(length < lengths[d] for pieces in packed for d, _, length in pieces)
    # Cutting the shuffled stream every 256 tokens would split almost one document a sequence.
    assert split < len(packed) / 10


def test_pack_once_pads_only_the_end():
    lengths = some_lengths(40)
    once = pack_once(lengths, 50)
    filled = [sum(piece.length for piece in pieces) for pieces in once]
    assert filled[:-1] == [50] * (len(once) - 1)
    assert filled[-1] == int(lengths.sum()) - 50 * (len(once) - 1)


def test_a_digest_knows_the_order_and_not_how_it_was_asked_for():
    def packed(seed=1, lengths=None):
        lengths = some_lengths(300) if lengths is None else lengths
        return Packing(lengths, 64, seed=seed, stage="s", sequences=100)

    stepwise, at_once = packed(), packed()
    assert [stepwise.digest(n) for n in (0, 10, 40)][-1] == at_once.digest(40)
    assert stepwise.digest(10) == packed().digest(10) != at_once.digest(40)
    assert at_once.digest(40) != packed(seed=2).digest(40)
    longer = some_lengths(300)
    longer[int(at_once[3][0].document)] += 1
    assert at_once.digest(40) != packed(lengths=longer).digest(40)
