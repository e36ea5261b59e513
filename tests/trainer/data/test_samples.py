import numpy as np
import pytest
import torch
from longspan.trainer.data.packing import LOOK_AHEAD, Packing, epoch_order
from longspan.trainer.data.samples import (
    HeldOutSamples,
    LongDocuments,
    TrainingSamples,
    cut_contexts,
    join,
)
from reference.packing import naive_parts, naive_sample, naive_sequences


class Lists:
    def __init__(self, texts):
        self.texts = [np.array(text, np.int64) for text in texts]
        self.lengths = np.array([len(text) for text in texts])

    def __len__(self):
        return len(self.texts)

    def read(self, document, start, length):
        assert start + length <= len(self.texts[document])
        return self.texts[document][start : start + length]


def distinct_texts(count, seed=0, largest=50):
    """Texts in which every token occurs once, so that a wrong one shows."""
    lengths = np.random.default_rng(seed).integers(1, largest, count)
    ends = np.cumsum(lengths)
    return [list(range(1 + end - n, 1 + end)) for end, n in zip(ends, lengths, strict=True)]


def assert_equals_naive(sample, naive):
    tokens, labels, weights, bounds = naive
    assert sample.tokens_T.dtype == sample.labels_T.dtype == torch.int64
    assert sample.weights_T.dtype == torch.float32 and sample.cu_seqlens.dtype == torch.int32
    assert sample.tokens_T.tolist() == tokens
    assert sample.labels_T.tolist() == labels
    assert sample.weights_T.tolist() == weights
    assert sample.cu_seqlens.tolist() == bounds


def test_training_samples_equal_the_naive_construction():
    texts = distinct_texts(60)
    documents = Lists(texts)
    total = int(documents.lengths.sum())
    packing = Packing(documents.lengths, 32, seed=2, stage="s", sequences=2 * total // 32)
    parts = naive_parts(documents.lengths, 32)
    orders = [epoch_order(len(parts), 2, "s", epoch).tolist() for epoch in range(2)]
    naive = naive_sequences(parts, 32, orders, LOOK_AHEAD)
    samples = TrainingSamples(documents, packing)
    assert len(samples) == len(packing)
    for index in range(len(samples)):
        assert_equals_naive(samples[index], naive_sample(texts, naive[index], 32))


def test_a_split_document_keeps_the_label_at_the_split():
    documents = Lists([list(range(1, 11))])
    packing = Packing(documents.lengths, 4, seed=0, stage="s", sequences=2)
    samples = TrainingSamples(documents, packing)
    for sample in (samples[0], samples[1]):
        assert sample.labels_T.tolist() == (sample.tokens_T + 1).tolist()
        assert sample.weights_T.tolist() == [1, 1, 1, 1]


def test_held_out_samples_equal_the_naive_construction_and_label_every_token_once():
    texts = distinct_texts(30, seed=3)
    samples = HeldOutSamples(Lists(texts), 64)
    parts = naive_parts([len(text) for text in texts], 64)
    naive = naive_sequences(parts, 64, [range(len(parts))], LOOK_AHEAD)
    assert len(samples) == len(naive)
    labels = []
    for index in range(len(samples)):
        sample = samples[index]
        assert_equals_naive(sample, naive_sample(texts, naive[index], 64))
        labels += sample.labels_T[sample.weights_T == 1].tolist()
    assert sorted(labels) == sorted(token for text in texts for token in text[1:])
    assert int(samples[len(samples) - 1].cu_seqlens[-1]) == 64


def test_padding_is_a_piece_of_its_own():
    sample = HeldOutSamples(Lists([[5, 6, 7]]), 8)[0]
    assert sample.cu_seqlens.tolist() == [0, 3, 8]
    assert sample.weights_T.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_long_documents_are_longer_than_the_length_and_evenly_spaced():
    texts = [list(range(1, 2 + n)) for n in (10, 7, 8, 9, 20, 8, 30, 8)]
    long = LongDocuments(Lists(texts), 8, 3)
    assert [len(texts[d]) > 8 for d in long.chosen] == [True] * 3
    assert len(set(long.chosen.tolist())) == 3
    assert len(LongDocuments(Lists(texts), 8, 100)) == 7
    assert len(LongDocuments(Lists(texts), 100, 3)) == len(LongDocuments(Lists(texts), 8, 0)) == 0
    sample = long[0]
    assert sample.tokens_T.tolist() == list(range(1, 9))
    assert sample.labels_T.tolist() == list(range(2, 10))
    assert sample.weights_T.tolist() == [1] * 8
    assert sample.cu_seqlens.tolist() == [0, 8]


@pytest.mark.parametrize(("length", "visible"), [(40, 10), (40, 39), (40, 30), (40, 1), (41, 7)])
def test_a_cut_context_weighs_every_later_token_once_and_shows_enough_before_it(length, visible):
    document = LongDocuments(Lists([list(range(length + 5))]), length, 1)[0]
    most = visible + max(1, min(visible, length - visible) // 2) - 1
    found = []
    for sample in cut_contexts(document, visible):
        assert len(sample.tokens_T) == length == int(sample.cu_seqlens[-1])
        starts = torch.repeat_interleave(sample.cu_seqlens[:-1], sample.cu_seqlens.diff())
        seen = torch.arange(length) - starts + 1
        weighted = sample.weights_T == 1
        assert visible <= int(seen[weighted].min()) and int(seen[weighted].max()) <= most
        assert torch.equal(sample.labels_T[weighted], sample.tokens_T[weighted] + 1)
        # What comes before a weighted token is the document's own text, up to its place.
        first = sample.tokens_T[starts.long()]
        assert torch.equal(sample.tokens_T[weighted], (first + seen - 1)[weighted])
        found += sample.tokens_T[weighted].tolist()
    assert sorted(found) == list(range(visible, length))


def test_join_shifts_the_bounds():
    samples = HeldOutSamples(Lists(distinct_texts(12)), 40)
    parts = [samples[i] for i in range(3)]
    joined = join(parts)
    assert joined.tokens_T.tolist() == [t for part in parts for t in part.tokens_T.tolist()]
    assert joined.labels_T.tolist() == [t for part in parts for t in part.labels_T.tolist()]
    assert joined.weights_T.tolist() == [t for part in parts for t in part.weights_T.tolist()]
    pieces = joined.cu_seqlens.diff().tolist()
    assert pieces == [n for part in parts for n in part.cu_seqlens.diff().tolist()]
    assert joined.cu_seqlens[0] == 0 and joined.cu_seqlens.dtype == torch.int32
