"""How evenly context ranks share attention, where they trade heads too."""

import pytest
import torch
from longspan.attention.pairs import dense
from longspan.parallel.imbalance import loads_of
from longspan.parallel.layout import make_layout
from longspan.trainer.context_load import ContextLoad
from longspan.trainer.exchange_choice import ExchangeChoice
from support.tiny import tiny_run

ONE = torch.tensor([0, 64])


def imbalance(layout, cu, pairs):
    loads = loads_of(layout, cu, pairs)
    return max(loads) * len(loads) / sum(loads)


def load(choice, ranks, batches, **parallel):
    """The imbalance of a model of 4 query and 2 key-value heads."""
    run = tiny_run(stage__parallel={"context": ranks, **parallel})
    return ContextLoad(run.model, run.stages[0], choice).imbalance(batches)


@pytest.mark.parametrize("kind", ["ring", "all_gather", "double_ring", "fetch"])
def test_a_rank_s_load_is_what_its_tokens_see(kind):
    layout = make_layout("contiguous", 64, 4)
    choice = ExchangeChoice(kind, inner=2 if kind == "double_ring" else 1)
    assert load(choice, 4, [(layout, ONE)]) == imbalance(layout, [0, 64], dense)


def test_over_heads_a_rank_s_load_is_its_share_of_them():
    layout = make_layout("contiguous", 64, 2)
    assert load(ExchangeChoice("ulysses"), 2, [(layout, ONE)]) == 1
    assert load(ExchangeChoice("ulysses"), 2, [(layout, ONE)], tensor=2) == 1
    # Three ranks, two key-value heads: one of the ranks has two of the four query heads.
    layout = make_layout("contiguous", 64, 3)
    assert load(ExchangeChoice("ulysses"), 3, [(layout, ONE)]) == pytest.approx(1.5)


def test_a_team_s_load_is_what_the_tokens_of_its_members_see():
    found = load(ExchangeChoice("two_d", inner=2), 4, [(make_layout("contiguous", 64, 4), ONE)])
    assert found == imbalance(make_layout("contiguous", 64, 2), [0, 64], dense)


def test_ranks_wait_in_every_micro_batch():
    layout, halves = make_layout("contiguous", 64, 2), torch.tensor([0, 33, 64])
    found = load(ExchangeChoice("ring"), 2, [(layout, ONE), (layout, halves)])
    sums = [dense(64), dense(33) + dense(31)]
    each = [imbalance(layout, [0, 64], dense), imbalance(layout, [0, 33, 64], dense)]
    want = sum(total * ratio for total, ratio in zip(sums, each, strict=True)) / sum(sums)
    assert found == pytest.approx(want) and 1 < found < each[0]


def test_one_rank_has_none():
    assert load(ExchangeChoice("all_gather"), 1, [(make_layout("contiguous", 64, 1), ONE)]) is None
