"""Shard: the file of one rank, in the safetensors format, and the host memory it is staged in.

The memory is laid out as the file is, so that a training step waits for one copy of the state and
the rest is writing bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from .boxes import Box

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is stored of each element of a parameter, all in fp32: its value and AdamW's moments."""

_BYTES = 4
_CHUNK = 2**24


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter that a rank writes.

    Attributes:
        name: The parameter's global name.
        shape: Of the full parameter.
        box: Which elements.
        tensors: Of each kind, fp32 with the box's elements in order.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """Where a piece lies in a file: the first byte of each kind."""

    name: str
    shape: tuple[int, ...]
    box: Box
    offsets: tuple[int, ...]


def shard_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank-{rank:05d}.safetensors"


@dataclass
class Staging:
    """Host memory that a state is copied to, kept from one checkpoint to the next."""

    _memory: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))

    def take(self, count: int, pinned: bool) -> torch.Tensor:
        """Memory for `count` fp32 numbers; what was in it is lost."""
        if self._memory.numel() < count:
            self._memory = torch.empty(0)  # gone before there is more
            try:
                self._memory = torch.empty(count, dtype=torch.float32, pin_memory=pinned)
            except RuntimeError:  # the system lets only so much be pinned: a slower copy will do
                self._memory = torch.empty(count, dtype=torch.float32)
            self._memory.zero_()  # the system gives pages when they are first written
        return self._memory[:count]


@dataclass(frozen=True)
class Shard:
    """A file as it will be: header, entries and bytes."""

    header: bytes
    entries: tuple[Entry, ...]
    data: torch.Tensor

    def parts(self) -> Iterator[memoryview]:
        """The file's bytes, a few megabytes at a time."""
        yield memoryview(self.header)
        data = memoryview(cast(Any, self.data.numpy())).cast("B")
        for first in range(0, len(data), _CHUNK):
            yield data[first : first + _CHUNK]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data.numel() * _BYTES


@torch.no_grad()
def stage(pieces: Sequence[Piece], staging: Staging) -> Shard:
    """Copy pieces from the device to the host; when this returns, training may change them."""
    device = pieces[0].tensors[0].device if pieces else torch.device("cpu")
    count = sum(piece.box.size for piece in pieces) * len(KINDS)
    memory = staging.take(count, pinned=device.type == "cuda")
    # Kind by kind: whoever wants the weights alone reads one stretch of the file.
    places, at = [], 0
    for kind in range(len(KINDS)):
        for piece in pieces:
            memory[at : at + piece.box.size].copy_(piece.tensors[kind].flatten(), non_blocking=True)
            places.append(at * _BYTES)
            at += piece.box.size
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    header = _header(pieces, places)
    entries = tuple(
        Entry(
            piece.name,
            piece.shape,
            piece.box,
            tuple(len(header) + place for place in places[number :: len(pieces)]),
        )
        for number, piece in enumerate(pieces)
    )
    return Shard(header, entries, memory)


def _header(pieces: Sequence[Piece], places: Sequence[int]) -> bytes:
    """The length of the JSON that says what lies where, and the JSON, padded to 8 bytes."""
    tensors: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for number, place in enumerate(places):
        kind, piece = divmod(number, len(pieces))
        box = pieces[piece].box
        name = f"{KINDS[kind]}/{pieces[piece].name}@{box.row},{box.column}"
        tensors[name] = {
            "dtype": "F32",
            "shape": [box.rows, box.columns],
            "data_offsets": [place, place + box.size * _BYTES],
        }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
