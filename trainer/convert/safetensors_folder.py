"""A folder of safetensors files: headers, rows and columns read by position, shards written.

The format is 8 bytes with the little-endian length of a JSON header, the header (dtype, shape and
byte range by name), and the tensors' bytes without gaps. Files are read with plain reads and not
mapped: mapped pages count as this process's memory, a whole shard of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch

from ...errors import ConversionError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
BLOCK_BYTES = 32 * 2**20
"""Tensors are read and written in blocks of whole rows of about this size."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class Header:
    """Where a tensor lies.

    Attributes:
        file: The shard.
        dtype: As safetensors calls it, such as BF16.
        shape: Of the tensor.
        offset: Of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def columns(self) -> int:
        """Elements of a row: of all dimensions but the first."""
        return math.prod(self.shape[1:])


class SafetensorsFolder:
    """The tensors of a folder; nothing but headers is read before a tensor is asked for.

    Args:
        path: A folder with `model.safetensors`, or shards and their index.

    Attributes:
        headers: By tensor name.

    Raises:
        ConversionError: There are no safetensors, a shard is missing, cut short or no safetensors
            file, or the index names tensors that the shards do not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, Header] = {}
        self._files: dict[Path, BufferedReader] = {}
        placed = _placed(path)
        missing = sorted({file for file in placed.values() if not (path / file).is_file()})
        if missing:
            what = f"{path} lacks {len(missing)} of its shards: {', '.join(missing)}"
            raise ConversionError(what, "download or copy the missing files")
        for file in sorted(set(placed.values())) or [SINGLE]:
            self.headers |= _headers(path / file)
        lost = [
            name
            for name, file in placed.items()
            if name not in self.headers or self.headers[name].file.name != file
        ]
        if lost:
            what = f"{path / INDEX} places tensors where they are not: {some(lost)}"
            raise ConversionError(what, "use an index that belongs to these shards")

    def read(
        self, name: str, first: int, count: int, columns: tuple[int, int] | None = None
    ) -> Iterator[torch.Tensor]:
        """Rows `[first, first + count)` of a tensor, in blocks of whole rows, in order.

        Args:
            name: The tensor.
            first: First row.
            count: Rows.
            columns: The range of columns that is wanted; all when left out.
        """
        header = self.headers[name]
        dtype, width = _DTYPES[header.dtype], header.columns
        row_bytes = width * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for row in range(first, first + count, step):
            rows = min(step, first + count - row)
            block = torch.empty((rows, *header.shape[1:]), dtype=dtype)
            self._fill(header.file, header.offset + row * row_bytes, as_bytes(block))
            yield block if columns is None else block[:, slice(*columns)]

    def _fill(self, file: Path, offset: int, target: memoryview) -> None:
        try:
            stream = self._open(file)
            stream.seek(offset)
            read = stream.readinto(target)
        except OSError as error:
            raise ConversionError(f"{file} cannot be read: {error.strerror}", _AGAIN) from error
        if read != len(target):
            raise ConversionError(f"{file} ends too early", _AGAIN)

    def _open(self, file: Path) -> BufferedReader:
        """One file at a time stays open."""
        if file not in self._files:
            for other in self._files.values():
                other.close()
            self._files = {file: file.open("rb")}
        return self._files[file]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def is_plain(header: Header) -> bool:
    """Whether the tensor has one of the dtypes that are read."""
    return header.dtype in _DTYPES


def write_folder(
    path: Path,
    tensors: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    blocks: Iterable[torch.Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as a stream into safetensors files, and their index if there are several.

    Args:
        path: An existing folder.
        tensors: Shape of every tensor by name, in the order in which their data come.
        dtype: Of all of them.
        blocks: The data: blocks of whole rows, tensor after tensor, converted on the way.
        shard_bytes: The most bytes of tensors in a file, unless one tensor alone is larger.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in tensors.items()}
    shards = _shards(sizes, shard_bytes)
    stream = iter(blocks)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        with (path / file).open("wb") as out:
            out.write(_encoded({name: tensors[name] for name in names}, sizes, dtype))
            for name in names:
                _copy(out, name, sizes[name], dtype, stream)
            out.flush()
            os.fsync(out.fileno())
    assert next(stream, None) is None, "more data than tensors"
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        text = json.dumps({"metadata": total, "weight_map": index}, indent=1)
        (path / INDEX).write_text(text + "\n", "utf-8")


def _copy(
    out: IO[bytes], name: str, size: int, dtype: torch.dtype, blocks: Iterator[torch.Tensor]
) -> None:
    while size > 0:
        block = next(blocks).to(dtype).contiguous()
        size -= out.write(as_bytes(block))
    assert size == 0, f"the blocks of {name} are not its shape"


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _encoded(
    tensors: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: torch.dtype
) -> bytes:
    """The header, padded so that the data are aligned to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors.items():
        offsets = [start, start + sizes[name]]
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _placed(path: Path) -> dict[str, str]:
    """The file of each tensor as the index says; empty where one file holds them all."""
    if (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            what = f"{path} has both {SINGLE} and {INDEX}, which may hold different weights"
            raise ConversionError(what, "remove the one that is not meant")
        try:
            placed = json.loads((path / INDEX).read_text("utf-8"))["weight_map"]
            if all(isinstance(file, str) and Path(file).name == file for file in placed.values()):
                return placed
            error = "a shard's name is no plain file name"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            error = str(problem)
        raise ConversionError(f"{path / INDEX} cannot be used: {error}", _AGAIN)
    if (path / SINGLE).is_file():
        return {}
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ConversionError(
            f"{path} has its weights in pickle files ({some(pickles)}), which can run code when "
            "they are read and are never opened here",
            "get the safetensors version, or if you trust their source load them with "
            "transformers once and save them with `save_pretrained`",
        )
    raise ConversionError(
        f"{path} has neither {SINGLE} nor {INDEX}", "give a folder that holds a complete checkpoint"
    )


def _headers(file: Path) -> dict[str, Header]:
    """The header of one file, every tensor inside the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version"):
                what = f"{file} is a Git LFS pointer, not the file itself"
                raise ConversionError(what, "run `git lfs pull` in that folder")
            if len(start) < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            table = json.loads(stream.read(length))
        table.pop("__metadata__", None)
        return {name: _header(file, entry, 8 + length, size) for name, entry in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{file} is no usable safetensors file: {error}", _AGAIN) from error


def _header(file: Path, entry: dict[str, Any], start: int, size: int) -> Header:
    first, last = entry["data_offsets"]
    header = Header(file, entry["dtype"], tuple(entry["shape"]), start + first)
    if not 0 <= first <= last <= size - start:
        raise ValueError(f"it is cut short: {start + last} bytes are needed, it has {size}")
    if is_plain(header):
        wanted = math.prod(header.shape) * _DTYPES[header.dtype].itemsize
        if last - first != wanted:
            raise ValueError(f"a tensor of shape {header.shape} has {last - first} bytes")
    return header


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
