"""Bytes that are sent, against the closed forms."""

import pytest
import torch
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.settings import ParallelSettings
from longspan.parallel.simulation import simulate
from longspan.parallel.traffic import CountedTransport, Traffic
from longspan.parallel.volume import Volume, volume_of, volume_of_gathering
from longspan.tests.parallel.ranks import DOCUMENTS, LENGTH, SCALE

WIRE = {torch.bfloat16: (2, 4), torch.float32: (4, 4), torch.float64: (8, 8)}


def counted(ranks, body):
    """What each rank sends while `body(transport)` runs forward, and then its result backward."""

    def on_rank(transport):
        traffic = Traffic()
        out = body(CountedTransport(transport, traffic))
        there = list(traffic.messages)
        forward = traffic.take()
        out.float().sum().backward()
        back = list(traffic.messages)
        return Volume(forward, traffic.take()), there, back

    return simulate(ranks, on_rank)


def attend(kind, ranks, groups, dtype):
    layout = make_layout("zigzag", LENGTH, ranks)
    reach = Reach.documents(DOCUMENTS)

    def body(transport):
        index = layout.index(transport.rank)
        shapes = [(len(index), 4, 6), (len(index), groups, 6), (len(index), groups, 4)]
        q, k, v = (torch.ones(shape, dtype=dtype).requires_grad_() for shape in shapes)
        exchange = make_exchange(kind, layout, transport)
        return exchange.attend(q, k, v, reach.rows(index), scale=SCALE)[0]

    return counted(ranks, body)


@pytest.mark.parametrize("dtype", WIRE)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_an_exchange_sends_what_the_closed_form_says(ranks, kind, groups, dtype):
    parallel = ParallelSettings(context=ranks, exchange=kind)
    want = volume_of(parallel, LENGTH // ranks, groups * (6 + 4), *WIRE[dtype])
    for found, there, back in attend(kind, ranks, groups, dtype):
        assert found == want
        kinds = {message.kind for message in there + back}
        # Each is what it says: a ring knows only its neighbour.
        assert kinds == ({"send"} if kind == "ring" else {"all_gather", "reduce_scatter"})
        if kind == "ring":
            assert len(there) == ranks - 1 and len(back) == 2 * ranks - 1


@pytest.mark.parametrize("dtype", WIRE)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gathering_sends_what_the_closed_form_says(ranks, dtype):
    layout = make_layout("zigzag", LENGTH, ranks)

    def body(transport):
        x = torch.ones(LENGTH // ranks, 2, 6, dtype=dtype, requires_grad=True)
        return make_exchange("ring", layout, transport).gather(x)

    want = volume_of_gathering(ranks, LENGTH // ranks, 12, *WIRE[dtype], learns=True)
    assert [found for found, _, _ in counted(ranks, body)] == [want] * ranks


def test_one_rank_sends_nothing():
    assert volume_of(ParallelSettings(), 64, 32, 2) == (0, 0)
