import torch
from longspan.attention.notes import Notes


def test_shared_terms_count_once_and_parts_add_up():
    """Two tensor ranks, and a name that has terms of both kinds."""
    total = torch.zeros(2, dtype=torch.float64)
    for rank in range(2):
        notes = Notes()
        notes.add("loss", torch.tensor(3.0), 4.0)  # the same on both
        notes.add("loss", torch.tensor(1.0 + rank), 2.0, part=True)
        notes.add("other", torch.tensor(5.0), torch.tensor(1.0))
        assert notes.sums["loss"].tolist() == [4.0 + rank, 6.0] and notes.parts == {"loss"}
        total += notes.share("loss", rank == 0)
        assert notes.share("other", rank == 0).tolist() == ([5.0, 1.0] if rank == 0 else [0.0, 0.0])
        assert notes.share("nothing", True) is None
    assert total.tolist() == [3.0 + 1.0 + 2.0, 4.0 + 2.0]
