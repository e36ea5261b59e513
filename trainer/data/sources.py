"""Reads documents from text files, JSON lines, Parquet and the standard library. No torch here."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import DataError, Problem
from .settings import JsonlSource, ParquetSource, Source, StdlibSource

CONTENT_BYTES = 64 * 2**20
"""Sources up to this size in all are recognised by their content, larger ones by path, size and
modification time: hashing a terabyte at every start would cost more than tokenising it again."""

_PROBE_BYTES = 2**16
_ROWS_AT_ONCE = 64
_SUFFIXES = {"text": ("",), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_WHERE = "relative paths start at the working directory"


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: Valid Unicode, possibly empty.
        origin: File, and line or row, as shown in messages.
        bytes_read: Bytes of all sources read up to the end of this document, as on disk.
    """

    text: str
    origin: str
    bytes_read: int


def read_documents(sources: Sequence[Source]) -> Iterator[Document]:
    """Every document, source by source, files in sorted order, one file at a time.

    Raises:
        DataError: A file is missing, unreadable, not UTF-8 or lacks the text field.
    """
    done = 0
    for source in sources:
        for path in source_files(source):
            for text, origin, position in _read(source, path):
                yield Document(text, origin, done + position)
            done += _size(path)


def source_files(source: Source) -> list[Path]:
    """The files of a source, sorted, each once.

    Raises:
        DataError: One of the paths does not exist or matches no file.
    """
    if isinstance(source, StdlibSource):
        return _library_files()
    return sorted(set(chain.from_iterable(_matches(path, source.kind) for path in source.paths)))


def total_bytes(sources: Sequence[Source]) -> int:
    """Bytes of all the files, as on disk."""
    return sum(_size(path) for source in sources for path in source_files(source))


def fingerprint(sources: Sequence[Source]) -> str:
    """A key that changes when the documents do; see `CONTENT_BYTES`."""
    by_content = total_bytes(sources) <= CONTENT_BYTES
    key = hashlib.blake2b(digest_size=16)
    for source in sources:
        for path in source_files(source):
            with _reading(path), path.open("rb") as file:
                if by_content:
                    seen: list[Any] = [hashlib.file_digest(file, "blake2b").hexdigest()]
                else:
                    stat = os.fstat(file.fileno())
                    seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
            field = getattr(source, "field", None)
            key.update(json.dumps([source.kind, field, path.suffix == ".gz", *seen]).encode())
    return key.hexdigest()


def check_sources(sources: Sequence[Source]) -> list[Problem]:
    """What can be seen without reading everything: files, and the text field of a first document.

    Returns:
        Problems with paths that start at `sources.N`.
    """
    problems = []
    for index, source in enumerate(sources):
        if isinstance(source, StdlibSource):
            found = {f"sources.{index}": _try_path("", source)}
        else:
            paths = enumerate(source.paths)
            found = {f"sources.{index}.paths.{n}": _try_path(path, source) for n, path in paths}
        for where, result in found.items():
            if isinstance(result, DataError):
                expected = "files with documents that can be read"
                problems.append(Problem(where, result.what, expected, result.fix))
        files = list(chain.from_iterable(r for r in found.values() if isinstance(r, list)))
        if files and not any(map(_size, files)):
            fix = "name other files: an empty file gives no document"
            problems.append(Problem(f"sources.{index}", "only empty files", "documents", fix))
    return problems


def _try_path(path: str, source: Source) -> list[Path] | DataError:
    """The files of one entry of `paths`, or what is wrong with it or with its first file."""
    try:
        library = isinstance(source, StdlibSource)
        files = _library_files() if library else sorted(_matches(path, source.kind))
        _probe(source, files[0])
    except DataError as error:
        return error
    return files


def _probe(source: Source, path: Path) -> None:
    """Raise what reading the start of `path` would raise."""
    if isinstance(source, ParquetSource):
        _open_parquet(path, source.field)
    elif isinstance(source, JsonlSource):
        next(_read(source, path), None)
    else:
        with _reading(path), path.open("rb") as file:
            start = file.read(_PROBE_BYTES)
        # A character that the cut splits is no error.
        _utf8(start[: start.rfind(b"\n") + 1], _name(path))


def _name(path: Path) -> str:
    """The path as text that can always be printed."""
    return str(path).encode("utf-8", "replace").decode()


def _size(path: Path) -> int:
    with _reading(path):
        return path.stat().st_size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell what the system says about `path` as a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check that the file is complete and that you may read it"
        raise DataError(f"cannot read {_name(path)}: {reason}", fix) from error


def _matches(pattern: str, kind: str) -> list[Path]:
    path = Path(pattern).expanduser()
    with _reading(path):
        if path.is_file():
            return [path]
        if path.is_dir():
            return _folder_files(path, _SUFFIXES[kind])
        if path.exists():
            raise DataError(f"{_name(path)} is neither a file nor a folder", "name a regular file")
        if not glob.has_magic(pattern):
            raise DataError(f"{_name(path)} does not exist", f"correct the path; {_WHERE}")
        # Unlike Path.glob, this takes absolute patterns.
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    files = [match for match in found if match.is_file()]
    if not files:
        what = f"only folders match {pattern!r}" if found else f"no file matches {pattern!r}"
        fix = f"correct the glob ('**' stands for any depth of folders); {_WHERE}"
        raise DataError(what, fix)
    return files


def _folder_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below `folder` that end in one of `suffixes`; nothing hidden."""
    files = []
    for at, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        files += [Path(at, name) for name in shown if name.endswith(suffixes)]
    files = [path for path in files if path.is_file()]
    if not files:
        kinds = " or ".join(f"*{suffix}" for suffix in suffixes if suffix)
        what = f"folder {_name(folder)} holds no {kinds} files".replace("  ", " ")
        raise DataError(what, "name the files themselves or a folder that holds some")
    return files


def _raise(error: OSError) -> None:
    raise error


def _library_files() -> list[Path]:
    """Modules of the running interpreter's standard library, without its test suites."""
    root = sysconfig.get_path("stdlib")
    files = []
    for at, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        files += [Path(at, name) for name in names if name.endswith(".py")]
    if not files:
        what = f"this Python keeps no source of its standard library in {root}"
        raise DataError(what, "use another source, or a Python installed with its library's source")
    return sorted(files)


def _read(source: Source, path: Path) -> Iterator[tuple[str, str, int]]:
    """Texts of one file, each with its origin and the position after it in the file."""
    with _reading(path):
        if isinstance(source, JsonlSource):
            yield from _read_jsonl(path, source.field)
        elif isinstance(source, ParquetSource):
            yield from _read_parquet(path, source.field)
        else:
            data = path.read_bytes()
            yield _utf8(data, _name(path)), _name(path), len(data)


def _utf8(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = "convert it to UTF-8, or leave it out with a glob such as 'texts/**/*.txt'"
        raise DataError(f"{origin} is not UTF-8 text (byte {error.start})", fix) from error


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str, int]]:
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        for number, line in enumerate(lines, 1):
            if line.strip():
                origin = f"{_name(path)} line {number}"
                yield _json_text(line, field, origin), origin, raw.tell()


def _json_text(line: bytes, field: str, origin: str) -> str:
    try:
        row = json.loads(_utf8(line, origin))
    except (ValueError, RecursionError) as error:
        fix = "one JSON object a line, such as {" + f'"{field}": "..."' + "}"
        raise DataError(f"{origin} is not valid JSON: {error}", fix) from error
    if not isinstance(row, dict):
        what = f"{origin} is {_json_kind(row)}, not an object"
        raise DataError(what, "one JSON object a line, such as {" + f'"{field}": "..."' + "}")
    if field not in row:
        raise DataError(*_no_field(origin, field, list(row)))
    text = row[field]
    if not isinstance(text, str):
        what = f"{origin}: field {field!r} is {_json_kind(text)}, not a string"
        raise DataError(what, "set `field` to the one that holds the text, or drop the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{origin}: field {field!r} holds half of a surrogate pair"
        raise DataError(what, "write it again as valid Unicode, or drop the line") from error
    return text


def _json_kind(value: Any) -> str:
    kinds = {bool: "a boolean", dict: "an object", list: "a list", str: "a string"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _no_field(origin: str, field: str, names: list[str]) -> tuple[str, str]:
    there = ", ".join(map(repr, names)) or "none"
    what = f"{origin} has no field {field!r}; its fields: {there}"
    return what, "set `field` of the source to the one that holds the text"


def _open_parquet(path: Path, field: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` whose column `field` holds strings."""
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        what = f"{_name(path)} is not a readable Parquet file: {error}"
        raise DataError(what, "write or fetch the file again, or leave it out") from error
    if field not in schema.names:
        raise DataError(*_no_field(_name(path), field, schema.names))
    kind = schema.field(field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        what = f"{_name(path)}: field {field!r} holds {kind}, not strings"
        raise DataError(what, "set `field` of the source to the column that holds the text")
    return file


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str, int]]:
    import pyarrow

    file = _open_parquet(path, field)
    rows, size, row = file.metadata.num_rows, path.stat().st_size, 0
    origin = _name(path)
    try:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field]):
            for value in batch.column(0):
                row += 1
                origin = f"{_name(path)} row {row}"
                text = value.as_py()
                if text is None:
                    what = f"{origin}: field {field!r} is null, not a string"
                    raise DataError(what, "drop the rows without a text from the file")
                yield text, origin, size * row // rows
    except UnicodeDecodeError as error:
        what = f"{origin}: field {field!r} is not UTF-8 text (byte {error.start})"
        raise DataError(what, "write the file again from valid text") from error
    except (OSError, pyarrow.ArrowException) as error:
        what = f"{_name(path)} cannot be read beyond row {row}: {error}"
        raise DataError(what, "write or fetch the file again, or leave it out") from error
