"""Manifest: what a checkpoint is, and the size and hash of each of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import CheckpointError
from .cursor import Cursor
from .files import CheckpointFiles
from .folders import MARKER

if TYPE_CHECKING:
    from typing_extensions import Buffer

MANIFEST = "manifest.json"
FORMAT = 2
"""Raise it when checkpoints are laid out in another way."""

_CHUNK = 2**24
_OTHERS = "`longspan checkpoint ls` shows the others of the run"


@dataclass(frozen=True)
class Record:
    """Bytes of a file, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


def record(parts: Iterable[Buffer]) -> Record:
    """The record of a file's parts."""
    size, digest = 0, hashlib.sha256()
    for part in parts:
        size += memoryview(part).nbytes
        digest.update(part)
    return Record(size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        cursor: Where the run stood.
        files: All files but the manifest itself and the marker.
        info: What explains the checkpoint: the stage, layout, versions, recipe, RoPE, attention.
    """

    cursor: Cursor
    files: Mapping[str, Record]
    info: Mapping[str, Any]

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        whole = {
            "format": FORMAT,
            "longspan": __version__,
            "cursor": asdict(self.cursor),
            **self.info,
            "files": files,
        }
        return (json.dumps(whole, indent=1) + "\n").encode()


def marker_of(manifest: bytes) -> bytes:
    """What the marker of a checkpoint with this manifest holds."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def read_manifest(files: CheckpointFiles) -> Manifest:
    """The manifest of a committed checkpoint, as its marker vouches for it.

    Raises:
        CheckpointError: It is missing, changed, or of another version of longspan.
    """
    text = files.read(MANIFEST)
    try:
        raw: dict[str, Any] = json.loads(text)
        form, made = raw.pop("format"), raw.pop("longspan", "unknown")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{MANIFEST} of checkpoint {files} cannot be read: {error!r}", _OTHERS
        ) from error
    if form != FORMAT:
        raise CheckpointError(
            f"checkpoint {files} has format {form}, written by longspan {made}; "
            f"this is {__version__}, which reads format {FORMAT}",
            "go on with the longspan that wrote it",
        )
    if files.read(MARKER) != marker_of(text):
        raise CheckpointError(
            f"{MANIFEST} of checkpoint {files} is not the one that was committed", _OTHERS
        )
    try:
        cursor = Cursor(**raw.pop("cursor"))
        records = {name: Record(**value) for name, value in raw.pop("files").items()}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{MANIFEST} of checkpoint {files} is incomplete: {error!r}", _OTHERS
        ) from error
    return Manifest(cursor, records, raw)


def damages(
    files: CheckpointFiles, manifest: Manifest, *, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """What is wrong with a checkpoint's files, a sentence each; every byte is read.

    Args:
        files: Of the checkpoint.
        manifest: Its manifest.
        share: (rank, ranks): of several that read one checkpoint, each looks at other files.
    """
    names = sorted(manifest.files)
    found = [damage(files, name, manifest.files[name]) for name in names[share[0] :: share[1]]]
    if share[0] == 0:
        known = {*names, MANIFEST, MARKER}
        extra = sorted(name for name in files.sizes() if name not in known)
        found += [f"{name} does not belong to it" for name in extra]
    return [sentence for sentence in found if sentence is not None]


def damage(files: CheckpointFiles, name: str, wanted: Record) -> str | None:
    """What is wrong with one file; every byte is read."""
    try:
        size = files.store.size(files.folder, name)
        if size != wanted.size:
            return f"{name} has {size:,} bytes in place of {wanted.size:,}"
        chunks = (files.read(name, at, min(size, at + _CHUNK)) for at in range(0, size, _CHUNK))
        if record(chunks).sha256 != wanted.sha256:
            return f"{name} is not what was written: its hash differs"
    except CheckpointError as error:
        return error.what
    return None
