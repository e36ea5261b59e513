"""Documents tokenised once into Megatron's indexed format and split into training and held-out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from .cache import build_once, disk_full, is_full
from .documents import DocumentWriter, IndexedDocuments
from .progress import Reading
from .settings import DataSettings, Source, Tokenizer, TrainedTokenizer
from .sources import Document, fingerprint, read_documents, total_bytes
from .tokenizer import TextTokenizer, train_tokenizer

FORMAT = 2
"""Raise it when the same settings give other files."""

_SPLITS = ("train", "held_out")
_INFO = "corpus.json"
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2**21


@dataclass(frozen=True)
class Corpus:
    """The documents of a stage, as tokens.

    Attributes:
        train: Documents to train on.
        held_out: Documents that no stage with the same `held_out` share trains on.
        vocab: Token ids are below this.
        eod: The token that ends every document.
        tokenizer_path: A folder that Hugging Face libraries load.
        key: Of the sources and settings.
        content: Of the training documents' tokens, wherever they came from.
        tokenizer_key: Of the tokenizer's files.
        info: Counts: documents, tokens, held_out_documents, held_out_tokens, duplicates, empty.
    """

    train: IndexedDocuments
    held_out: IndexedDocuments
    vocab: int
    eod: int
    tokenizer_path: Path
    key: str
    content: str
    tokenizer_key: str
    info: dict[str, int]


def prepare_corpus(
    data: DataSettings,
    tokenizer: Tokenizer,
    *,
    tokenizer_data: tuple[DataSettings, ...],
    cache: Path,
    progress: bool,
) -> Corpus:
    """The corpus of `data`, from the cache or made now; safe in several processes at once.

    Args:
        data: Sources and the share held out.
        tokenizer: Trained on `tokenizer_data`, or local.
        tokenizer_data: The data of all stages, so that they share one trained tokenizer.
        cache: The folder that keeps tokenizers and corpora, each under its own key.
        progress: Whether to show progress on stderr.

    Raises:
        DataError: A source or the tokenizer cannot be read, a split is empty, the disk is full.
    """
    if isinstance(tokenizer, TrainedTokenizer):
        text_tokenizer = _trained_tokenizer(tokenizer, tokenizer_data, cache, progress)
    else:
        text_tokenizer = TextTokenizer.load(Path(tokenizer.path).expanduser())
    seen = fingerprint(data.sources)
    key = _key("corpus", seen, data.held_out, text_tokenizer.key)
    folder = cache / f"corpus-{key}"

    def build(scratch: Path) -> None:
        text_tokenizer.save(scratch / "tokenizer")
        info = _tokenise(data, text_tokenizer, scratch, progress)
        _refuse_changed(data.sources, seen)
        (scratch / _INFO).write_text(json.dumps(info, indent=2))

    build_once(folder, build, progress=progress)
    return _open(folder, key, text_tokenizer)


def _trained_tokenizer(
    tokenizer: TrainedTokenizer, data: tuple[DataSettings, ...], cache: Path, progress: bool
) -> TextTokenizer:
    # The largest share, so that it learns from no document that any of the stages holds out.
    held_out = max(stage.held_out for stage in data)
    sources = tuple(dict.fromkeys(source for stage in data for source in stage.sources))
    seen = fingerprint(sources)
    folder = cache / f"tokenizer-{_key('tokenizer', seen, held_out, tokenizer.vocab)}"

    def build(scratch: Path) -> None:
        with Reading("training the tokenizer", total_bytes(sources), progress) as reading:
            texts = _training_texts(sources, held_out, reading)
            train_tokenizer(texts, tokenizer.vocab).save(scratch)
        _refuse_changed(sources, seen)

    build_once(folder, build, progress=progress)
    return TextTokenizer.load(folder)


def _training_texts(sources: Sequence[Source], held_out: float, reading: Reading) -> Iterator[str]:
    splits: Counter[str] = Counter()
    for document, split in _split(sources, held_out, Counter()):
        reading.update(document.bytes_read)
        splits[split] += 1
        if split == "train":
            yield document.text
    _refuse_empty(splits, held_out)


def _key(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def _refuse_changed(sources: Sequence[Source], seen: str) -> None:
    if fingerprint(sources) != seen:
        what = "the sources changed while they were being read"
        raise DataError(what, "run it again when nothing writes to them any more")


def _refuse_empty(splits: Counter[str], held_out: float) -> None:
    """Raise unless both splits have documents."""
    documents = splits.total()
    if not documents:
        raise DataError("the sources hold no text at all", "name sources with documents in them")
    empty = [split for split in _SPLITS if not splits[split]]
    if empty:
        split = "hold out" if empty == ["held_out"] else "train on"
        what = f"with held_out: {held_out}, none of {documents:,} distinct documents is left"
        more = "raise" if empty == ["held_out"] else "lower"
        raise DataError(f"{what} to {split}", f"{more} held_out, or add documents to the sources")


def _split(
    sources: Sequence[Source], held_out: float, dropped: Counter[str]
) -> Iterator[tuple[Document, str]]:
    """Distinct documents that have text, each with its split; the others are counted.

    The split hangs on the text alone, so that other documents or their order never change it.
    16 bytes per distinct document are remembered.
    """
    known: set[bytes] = set()
    for document in read_documents(sources):
        if not document.text.strip():
            dropped["empty"] += 1
            continue
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in known:
            dropped["duplicates"] += 1
            continue
        known.add(digest)
        share = int.from_bytes(digest[:8], "big") / 2**64
        yield document, "held_out" if share < held_out else "train"


def _batches(documents: Iterable[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    batch: list[tuple[Document, str]] = []
    characters = 0
    for document, split in documents:
        batch.append((document, split))
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenise(
    data: DataSettings, tokenizer: TextTokenizer, folder: Path, progress: bool
) -> dict[str, Any]:
    """Write both splits into `folder`; returns `Corpus.content` and the counts of its `info`."""
    dropped: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(DocumentWriter(folder / split, tokenizer.vocab))
            for split in _SPLITS
        }
        reading = stack.enter_context(Reading("tokenising", total_bytes(data.sources), progress))
        try:
            for batch in _batches(_split(data.sources, data.held_out, dropped)):
                encoded = tokenizer.encode_batch([document.text for document, _ in batch])
                for (_, split), ids in zip(batch, encoded, strict=True):
                    if not len(ids):
                        dropped["empty"] += 1
                        continue
                    writers[split].add(np.append(ids, tokenizer.eod))
                    documents[split] += 1
                    tokens[split] += len(ids) + 1
                reading.update(batch[-1][0].bytes_read)
            _refuse_empty(documents, data.held_out)
            for writer in writers.values():
                writer.finish()
        except OSError as error:
            if not is_full(error):
                raise
            written = tokens.total() * writers["train"].token_bytes
            missing = written * (reading.total - reading.done) // max(reading.done, 1)
            raise disk_full(folder, missing if reading.done else None) from error
    return {
        "content": writers["train"].content,
        "documents": documents["train"],
        "tokens": tokens["train"],
        "held_out_documents": documents["held_out"],
        "held_out_tokens": tokens["held_out"],
        "duplicates": dropped["duplicates"],
        "empty": dropped["empty"],
    }


def _open(folder: Path, key: str, tokenizer: TextTokenizer) -> Corpus:
    try:
        info = json.loads((folder / _INFO).read_text())
        splits = {split: IndexedDocuments(folder / split) for split in _SPLITS}
        complete = all(documents.complete for documents in splits.values())
        content = info.pop("content")
    except (OSError, ValueError, AssertionError, KeyError):
        complete, splits, info, content = False, {}, {}, ""
    if not complete:
        what = f"the tokenised data in {folder} are damaged"
        raise DataError(what, "delete that folder; it is made again from the sources")
    return Corpus(
        **splits,
        vocab=tokenizer.vocab,
        eod=tokenizer.eod,
        tokenizer_path=folder / "tokenizer",
        key=key,
        content=content,
        tokenizer_key=tokenizer.key,
        info=info,
    )
