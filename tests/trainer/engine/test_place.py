"""Which tokens of a micro-batch a context rank has: its tokens first, then spare rows."""

from types import SimpleNamespace

import pytest
import torch
from longspan.attention.rope import Rope
from longspan.parallel.layout import balanced_layout
from longspan.parallel.settings import ParallelSettings
from longspan.trainer.engine.microbatch import BatchBuilder
from longspan.trainer.engine.place import Places
from longspan.trainer.exchange_choice import ExchangeChoice
from support.tiny import random_sample, tiny_run


def pairs(tokens):
    return tokens * (tokens + 1) / 2


def places(rank=0, **parallel):
    settings = ParallelSettings.model_validate(parallel)
    transport = SimpleNamespace(rank=rank, size=settings.context)
    return Places(settings, ExchangeChoice("all_gather"), rank, transport, pairs)


def batch(sample, rank, **parallel):
    rope = Rope(tiny_run().stages[0].rope, 64)
    return BatchBuilder(places(rank, **parallel), rope, torch.device("cpu"), ())(sample)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped", "balanced"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("context", "length"), [(1, 61), (2, 61), (3, 64), (4, 5), (4, 3)])
def test_every_token_has_one_row_and_the_others_are_zeros(layout, sequence, context, length):
    tensor = {"tensor": 2, "sequence": True} if sequence else {}
    # No zeros but in spare rows.
    sample = random_sample(length, length, 2)
    sample = type(sample)(
        sample.tokens_T + 1, sample.labels_T + 1, sample.weights_T + 1, sample.cu_seqlens
    )
    starts_T = torch.bucketize(torch.arange(length), sample.cu_seqlens[1:], right=True)
    starts_T = sample.cu_seqlens[starts_T]
    owned = []
    for rank in range(context):
        made = batch(sample, rank, layout=layout, context=context, **tensor)
        index_T = (
            places(rank, layout=layout, context=context, **tensor).of(sample.cu_seqlens).index_T
        )
        rows = len(made.tokens_R)
        least = -(-length // context)
        assert rows == (least + least % 2 if sequence else least)
        for got_R, whole_S in (
            (made.tokens_R, sample.tokens_T),
            (made.labels_R, sample.labels_T),
            (made.weights_R, sample.weights_T),
        ):
            assert torch.equal(got_R[: made.tokens], whole_S[index_T])
            assert len(got_R) == rows and not got_R[made.tokens :].any()
        if made.spare_1R is None:
            assert rows * context == length
        else:
            assert made.spare_1R.tolist() == [[row >= made.tokens for row in range(rows)]]
        seen = made.attention
        assert torch.equal(seen.positions_T, index_T - starts_T[index_T])
        assert torch.equal(seen.weights_T, sample.weights_T[index_T])
        assert len(seen.documents.reach()) == made.tokens
        owned += index_T.tolist()
    assert sorted(owned) == list(range(length))


def test_layouts_that_ignore_documents_are_made_once():
    for layout in ("zigzag", "contiguous", "striped"):
        found = places(layout=layout, context=2)
        assert found.of(torch.tensor([0, 20, 61])) is found.of(torch.tensor([0, 61]))
        assert found.of(torch.tensor([0, 61])) is not found.of(torch.tensor([0, 60]))


def test_balanced_is_of_each_micro_batch():
    found = places(layout="balanced", context=4)
    one, other = torch.tensor([0, 5, 20, 61]), torch.tensor([0, 61])
    assert found.of(one) is found.of(one) is not found.of(other)
    for cu_seqlens in (one, other):
        assert found.of(cu_seqlens).layout == balanced_layout(cu_seqlens.tolist(), 4, pairs)
