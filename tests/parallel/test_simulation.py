import pytest
import torch
from longspan.parallel.simulation import simulate


def test_results_come_in_rank_order():
    assert simulate(5, lambda transport: (transport.rank, transport.size)) == [
        (rank, 5) for rank in range(5)
    ]


def test_shift_goes_round():
    def body(transport):
        number = torch.tensor([float(transport.rank)])
        first = transport.shift([number, number + 10])
        second = transport.shift([number + 20])
        return [x.item() for x in (*second.wait(), *first.wait())]

    assert simulate(3, body) == [[22, 2, 12], [20, 0, 10], [21, 1, 11]]


def test_all_gather_and_reduce_scatter():
    def body(transport):
        rank = transport.rank
        gathered = transport.all_gather(torch.tensor([rank, rank * rank]))
        reduced = transport.reduce_scatter(torch.tensor([[1.0, rank], [2.0, rank], [3.0, rank]]))
        return gathered.tolist(), reduced.tolist()

    squares = [[0, 0], [1, 1], [2, 4]]
    assert simulate(3, body) == [(squares, [3.0 * (rank + 1), 3.0]) for rank in range(3)]


def test_a_failing_rank_ends_all_with_its_exception():
    def body(transport):
        if transport.rank == 2:
            raise KeyError("rank 2 broke")
        transport.shift([torch.zeros(1)]).wait()
        transport.all_gather(torch.zeros(1))

    with pytest.raises(KeyError, match="rank 2 broke"):
        simulate(4, body)


def test_a_deadlock_is_an_error():
    def body(transport):
        if transport.rank:
            transport.all_gather(torch.zeros(1))

    with pytest.raises(RuntimeError, match="never sent"):
        simulate(3, body)


def test_a_tensor_may_not_be_written_while_it_is_sent():
    def body(transport):
        number = torch.zeros(1)
        handle = transport.shift([number])
        number += 1
        handle.wait()

    with pytest.raises(AssertionError, match="while it was being sent"):
        simulate(2, body)
