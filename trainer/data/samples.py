"""Tokens, labels and weights of one sequence, on the host.

Shape suffix: T, the tokens of the sequence, all its pieces one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .documents import Documents
from .packing import Packing, Piece, pack_once


@dataclass(frozen=True)
class Sample:
    """One sequence of packed documents.

    Attributes:
        tokens_T: int64; 0 on padding.
        labels_T: int64; the next token of the same document, also where a piece ends before its
            document does; 0 where there is none.
        weights_T: float32; 1 where there is a label, 0 at a document's last token and on padding.
        cu_seqlens: int32 [pieces + 1]; the bounds of the pieces. Padding is a last piece.
        number: Of the sequence (or the first of several) in its stage; random choices that are
            made once per micro-batch depend on it.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    weights_T: torch.Tensor
    cu_seqlens: torch.Tensor
    number: int = 0


class TrainingSamples:
    """The samples of a stage, in the packing's order.

    Args:
        documents: The training documents that `packing` was made for.
        packing: Which pieces make up each sequence.
    """

    def __init__(self, documents: Documents, packing: Packing) -> None:
        self.documents = documents
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Sample:
        sample = _sample(self.documents, self.packing[index], self.packing.sequence_length)
        return replace(sample, number=index)


class HeldOutSamples:
    """Every held-out document once; only the last sample is padded.

    Args:
        documents: The held-out documents.
        sequence_length: Tokens of a sample.
    """

    def __init__(self, documents: Documents, sequence_length: int) -> None:
        self.documents = documents
        self.sequence_length = sequence_length
        self.packing = pack_once(documents.lengths, sequence_length)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Sample:
        return _sample(self.documents, self.packing[index], self.sequence_length)


class LongDocuments:
    """The starts of documents longer than `length`, one per sample, every token with a label.

    Args:
        documents: The held-out documents.
        length: Tokens of a sample.
        count: Most samples; if more documents are long enough, evenly spaced ones are taken.
    """

    def __init__(self, documents: Documents, length: int, count: int) -> None:
        self.documents = documents
        self.length = length
        long = np.flatnonzero(documents.lengths > length)
        count = min(count, len(long))
        self.chosen = long[np.arange(count) * len(long) // max(count, 1)]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        piece = Piece(int(self.chosen[index]), 0, self.length)
        return _sample(self.documents, [piece], self.length)


def cut_step(length: int, visible: int) -> int:
    """Neighbouring tokens of a document of `length` tokens that share one cut context."""
    return max(1, min(visible, length - visible) // 2)


def cut_contexts(sample: Sample, visible: int) -> list[Sample]:
    """A document as short contexts that begin in its middle, several in a sample.

    Every token from `visible` on is weighted in exactly one of them, where it sees at least
    `visible` and fewer than `visible + cut_step` tokens, itself included.

    Args:
        sample: One document that fills the sample.
        visible: Tokens that every weighted token sees at least; less than the sample's.
    """
    length = len(sample.tokens_T)
    step = cut_step(length, visible)
    starts = range(visible, length, step)
    ranges = [(start - visible + 1, min(start + step, length)) for start in starts]
    fit = length // (visible - 1 + step)
    return [
        _cut_sample(sample, ranges[at : at + fit], visible - 1) for at in range(0, len(ranges), fit)
    ]


def join(samples: Sequence[Sample]) -> Sample:
    """The samples of a micro-batch as one, their pieces one after another."""
    parts = [samples[0].cu_seqlens]
    for sample in samples[1:]:
        parts.append(sample.cu_seqlens[1:] + parts[-1][-1])
    return Sample(
        torch.cat([sample.tokens_T for sample in samples]),
        torch.cat([sample.labels_T for sample in samples]),
        torch.cat([sample.weights_T for sample in samples]),
        torch.cat(parts),
        samples[0].number,
    )


def _cut_sample(sample: Sample, ranges: Sequence[tuple[int, int]], unweighted: int) -> Sample:
    """The given token ranges of a document as pieces, of which the first tokens weigh nothing."""
    tokens_T = torch.zeros_like(sample.tokens_T)
    labels_T = torch.zeros_like(sample.labels_T)
    weights_T = torch.zeros_like(sample.weights_T)
    bounds = [0]
    for first, last in ranges:
        begin, end = bounds[-1], bounds[-1] + last - first
        tokens_T[begin:end] = sample.tokens_T[first:last]
        labels_T[begin:end] = sample.labels_T[first:last]
        weights_T[begin + unweighted : end] = sample.weights_T[first + unweighted : last]
        bounds.append(end)
    if bounds[-1] < len(tokens_T):
        bounds.append(len(tokens_T))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return Sample(tokens_T, labels_T, weights_T, cu_seqlens)


def _sample(documents: Documents, pieces: Sequence[Piece], sequence_length: int) -> Sample:
    tokens_T = np.zeros(sequence_length, np.int64)
    labels_T = np.zeros(sequence_length, np.int64)
    weights_T = np.zeros(sequence_length, np.float32)
    bounds = [0]
    for document, start, length in pieces:
        labelled = min(length, int(documents.lengths[document]) - start - 1)
        # The token after the piece, if the document has one, is the label of its last token.
        text = documents.read(document, start, max(length, labelled + 1))
        at = bounds[-1]
        tokens_T[at : at + length] = text[:length]
        labels_T[at : at + labelled] = text[1 : labelled + 1]
        weights_T[at : at + labelled] = 1
        bounds.append(at + length)
    if bounds[-1] < sequence_length:
        bounds.append(sequence_length)
    return Sample(
        torch.from_numpy(tokens_T),
        torch.from_numpy(labels_T),
        torch.from_numpy(weights_T),
        torch.tensor(bounds, dtype=torch.int32),
    )
