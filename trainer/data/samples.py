"""Tokens, labels and weights of one sequence, on the host.

Shape suffix: T, the tokens of the sequence, all its pieces one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    weights_T: torch.Tensor
    cu_seqlens: torch.Tensor


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
        return _sample(self.documents, self.packing[index], self.packing.sequence_length)


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
    )


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
