"""What is read, how it is tokenised and what is held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ...settings import Count, Settings


class TextSource(Settings):
    """Plain-text files: one document each."""

    kind: Literal["text"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (read recursively) or globs, relative to the working directory."""


class JsonlSource(Settings):
    """JSON lines: one document a line."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs; folders give their `*.jsonl` and `*.jsonl.gz` files."""

    field: str = "text"
    """The key that holds the text."""


class ParquetSource(Settings):
    """Parquet files: one document a row."""

    kind: Literal["parquet"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs; folders give their `*.parquet` files."""

    field: str = "text"
    """The column that holds the text."""


class StdlibSource(Settings):
    """The source of the running Python's standard library: real text that needs no download."""

    kind: Literal["python-stdlib"]


Source = Annotated[
    TextSource | JsonlSource | ParquetSource | StdlibSource, Field(discriminator="kind")
]


class TrainedTokenizer(Settings):
    """A byte-level BPE trained on the run's own training documents."""

    kind: Literal["train"]
    vocab: Count = Field(default=4096, ge=257)
    """Vocabulary size, the 256 bytes and the end-of-document token included."""


class LocalTokenizer(Settings):
    """A Hugging Face tokenizer on local disk."""

    kind: Literal["hf"]
    path: str
    """A folder that holds `tokenizer.json`, or that file."""


Tokenizer = Annotated[TrainedTokenizer | LocalTokenizer, Field(discriminator="kind")]


class DataSettings(Settings):
    """The documents of a stage."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Documents of all sources, shuffled together."""

    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents never trained on, chosen by a hash of their text."""
