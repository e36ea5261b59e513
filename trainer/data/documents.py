"""Tokenised documents: what packing and samples read, whatever keeps them."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol

import numpy as np
import torch


class Documents(Protocol):
    """Documents of at least one token each; the last token ends the document."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        ...

    def __len__(self) -> int: ...

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a document, int64."""
        ...


class IndexedDocuments:
    """Documents in Megatron's indexed format, mapped into memory.

    Args:
        prefix: The path of the `.bin` and `.idx` files without these endings.
    """

    def __init__(self, prefix: Path) -> None:
        self._dataset = _megatron().IndexedDataset(str(prefix))
        self._bin = prefix.with_suffix(".bin")
        self._lengths = np.asarray(self._dataset.sequence_lengths, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a document, int64."""
        # Megatron trusts the bounds and would read on into the next document.
        assert start >= 0 and start + length <= self._lengths[document], (document, start, length)
        tokens = self._dataset.get(document, offset=start, length=length)
        return np.asarray(tokens).astype(np.int64)

    @property
    def complete(self) -> bool:
        """Whether the `.bin` file holds every token that the `.idx` file promises."""
        itemsize = np.dtype(self._dataset.index.dtype).itemsize
        return self._bin.stat().st_size == int(self._lengths.sum()) * itemsize


class DocumentWriter:
    """Writes documents in Megatron's indexed format, as a context manager.

    Args:
        prefix: As of `IndexedDocuments`.
        vocab: Token ids are below this; decides between 2 and 4 bytes a token.
    """

    def __init__(self, prefix: Path, vocab: int) -> None:
        indexed = _megatron()
        self._index = prefix.with_suffix(".idx")
        dtype = indexed.DType.optimal_dtype(vocab)
        self.token_bytes = np.dtype(dtype).itemsize
        self._builder = indexed.IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=dtype)
        self._content = hashlib.blake2b(digest_size=16)

    @property
    def content(self) -> str:
        """A key of the documents so far: only the same tokens in the same order have it."""
        return self._content.hexdigest()

    def add(self, tokens: np.ndarray) -> None:
        """Append a document of int64 tokens."""
        self._content.update(len(tokens).to_bytes(8, "little"))
        self._content.update(tokens.astype("<i8").tobytes())
        self._builder.add_document(torch.from_numpy(tokens), [len(tokens)])

    def finish(self) -> None:
        """Write the index. Without it there is nothing to open."""
        self._builder.finalize(str(self._index))

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # On a full disk closing fails again, after the error that counts.
        with suppress(OSError):
            self._builder.data_file.close()


def _megatron() -> ModuleType:
    """Megatron's indexed format, imported late: on a CPU it needs hooks that come before it."""
    from .. import engine  # noqa: F401  importing it installs the hooks

    from megatron.core.datasets import indexed_dataset  # isort: skip

    return indexed_dataset
