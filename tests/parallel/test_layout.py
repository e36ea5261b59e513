import subprocess
import sys

import pytest
import torch
from longspan.errors import LongspanError
from longspan.parallel.layout import divisor, make_layout


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_has_one_owner_and_ranks_own_equally_many(kind, ranks):
    layout = make_layout(kind, 48, ranks)
    index = [layout.index(rank) for rank in range(ranks)]
    assert {len(part) for part in index} == {layout.tokens} == {48 // ranks}
    assert torch.equal(torch.cat(index).sort().values, torch.arange(48))
    assert all(bool((part.diff() > 0).all()) and part.dtype == torch.int64 for part in index)


def test_zigzag_pairs_an_early_chunk_with_a_late_one():
    assert make_layout("zigzag", 8, 2).chunks == (((0, 2), (6, 8)), ((2, 4), (4, 6)))
    assert make_layout("contiguous", 8, 2).chunks == (((0, 4),), ((4, 8),))


def test_zigzag_balances_causal_work():
    layout = make_layout("zigzag", 64, 4)
    assert len({int(layout.index(rank).sum()) for rank in range(4)}) == 1


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_local_chunks_put_shards_in_global_order(kind):
    layout = make_layout(kind, 24, 3)
    shards = [layout.index(rank) for rank in range(3)]
    ordered = [shards[rank][start:stop] for rank, start, stop in layout.local_chunks()]
    assert torch.equal(torch.cat(ordered), torch.arange(24))


@pytest.mark.parametrize(
    ("kind", "length", "ranks", "unit"),
    [("zigzag", 12, 4, 8), ("contiguous", 10, 4, 4), ("zigzag", 4, 4, 8)],
)
def test_a_length_that_does_not_split_is_refused_with_a_fix(kind, length, ranks, unit):
    assert divisor(kind, ranks) == unit
    with pytest.raises(LongspanError, match=f"{length} tokens") as error:
        make_layout(kind, length, ranks)
    assert f"multiple of {unit}" in error.value.fix


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_divisor_is_the_smallest_length(kind, ranks):
    unit = divisor(kind, ranks)
    make_layout(kind, unit, ranks)
    if unit > 1:
        with pytest.raises(LongspanError):
            make_layout(kind, unit - 1, ranks)


def test_divisor_needs_no_torch():
    code = (
        "import sys; from longspan.parallel.layout import divisor, make_layout; "
        "divisor('zigzag', 2); make_layout('zigzag', 8, 2); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
