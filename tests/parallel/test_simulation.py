import pytest
import torch
from longspan.parallel.members import Members
from longspan.parallel.simulation import simulate
from longspan.parallel.transport import Incoming, Outgoing


def test_results_come_in_rank_order():
    assert simulate(5, lambda transport: (transport.rank, transport.size)) == [
        (rank, 5) for rank in range(5)
    ]


def round_trip(transport, numbers):
    """Sends numbers to the next rank, and receives those of the one before."""
    following, previous = ((transport.rank + step) % transport.size for step in (1, -1))
    sends = [Outgoing(following, torch.tensor([number])) for number in numbers]
    return transport.trade(sends, [Incoming(previous, 1, torch.zeros(0))] * len(numbers))


def test_messages_between_two_ranks_keep_their_order():
    def body(transport):
        first = round_trip(transport, [float(transport.rank), transport.rank + 10.0])
        second = round_trip(transport, [transport.rank + 20.0])
        return [x.item() for x in (*second.wait(), *first.wait())]

    assert simulate(3, body) == [[22, 2, 12], [20, 0, 10], [21, 1, 11]]


def test_nothing_is_not_sent():
    def body(transport):
        peer, nothing = 1 - transport.rank, torch.zeros(0, 2)
        handle = transport.trade([Outgoing(peer, nothing)], [Incoming(peer, 0, nothing)])
        return [x.shape for x in handle.wait()]

    assert simulate(2, body) == [[(0, 2)], [(0, 2)]]


def test_members_are_ranks_of_their_own():
    def body(transport):
        team = [0, 2] if transport.rank % 2 == 0 else [3, 1]
        members = Members(transport, team)
        number = torch.tensor([float(transport.rank)])
        (gathered,) = members.all_gather(number).wait()
        (summed,) = members.reduce_scatter(torch.stack([number, number + 10])).wait()
        return members.rank, gathered.flatten().tolist(), summed.item()

    assert simulate(4, body) == [
        (0, [0.0, 2.0], 2.0),
        (1, [3.0, 1.0], 24.0),
        (1, [0.0, 2.0], 22.0),
        (0, [3.0, 1.0], 4.0),
    ]


def test_all_gather_and_reduce_scatter():
    def body(transport):
        rank = transport.rank
        (gathered,) = transport.all_gather(torch.tensor([rank, rank * rank])).wait()
        parts = torch.tensor([[1.0, rank], [2.0, rank], [3.0, rank]])
        (reduced,) = transport.reduce_scatter(parts).wait()
        return gathered.tolist(), reduced.tolist()

    squares = [[0, 0], [1, 1], [2, 4]]
    assert simulate(3, body) == [(squares, [3.0 * (rank + 1), 3.0]) for rank in range(3)]


def test_a_failing_rank_ends_all_with_its_exception():
    def body(transport):
        if transport.rank == 2:
            raise KeyError("rank 2 broke")
        round_trip(transport, [1.0]).wait()
        transport.all_gather(torch.zeros(1)).wait()

    with pytest.raises(KeyError, match="rank 2 broke"):
        simulate(4, body)


def test_a_deadlock_is_an_error():
    def body(transport):
        if transport.rank:
            transport.all_gather(torch.zeros(1)).wait()

    with pytest.raises(RuntimeError, match="never sent"):
        simulate(3, body)


def test_a_tensor_may_not_be_written_while_it_is_sent():
    def body(transport):
        number = torch.zeros(1)
        handle = transport.trade([Outgoing(1 - transport.rank, number)], [])
        number += 1
        handle.wait()

    with pytest.raises(AssertionError, match="while it was being sent"):
        simulate(2, body)
