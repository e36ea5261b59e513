"""ObjectStore: checkpoints in an object store, committed by the single upload of a marker."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, RunError
from .folders import LATEST, MARKER, FolderName, Kind, parse
from .owner import OWNER, Owner
from .system_errors import explained
from .urls import redacted

if TYPE_CHECKING:
    from typing_extensions import Buffer

ASIDE = "ASIDE"
"""The object that a folder has in place of its marker once it was set aside."""

PART_BYTES = 64 * 2**20
"""Of an upload in several parts; S3 takes 10,000 of them, so a file has at most 625 GiB."""


class ObjectStore:
    """A `Store` behind a URL of fsspec's, such as `s3://bucket/prefix`.

    Objects cannot be renamed, so an attempt keeps its name, `step-N.try-K`, and is complete as soon
    as it has a marker: one upload, which a store does wholly or not at all. Listings are taken
    from the store each time. Tested with S3.

    Args:
        url: The place. Credentials come from the environment or from files, as fsspec says.
        run_dir: The run that owns it.
        part_bytes: Of an upload in several parts; S3 wants at least 5 MiB.

    Raises:
        RunError: A package is missing, or the URL names nothing that fsspec knows.
    """

    def __init__(self, url: str, run_dir: Path, part_bytes: int = PART_BYTES) -> None:
        self.root, self._run_dir, self._part_bytes = url.rstrip("/"), run_dir, part_bytes
        self._fs, self._path = _connect(self.root)
        self._claimed = False
        self._begun: set[FolderName] = set()

    def __str__(self) -> str:
        return redacted(self.root)

    def claim(self) -> None:
        """Make the place this run's. See `Store`."""
        if self._claimed:
            return
        with explained("checkpoints cannot be written", self.root):
            owner, path = Owner.of(self._run_dir), f"{self._path}/{OWNER}"
            if not self._fs.exists(path):
                # Refused where another run was first; which one it was is read back.
                with suppress(FileExistsError):
                    self._fs.pipe_file(path, owner.content, mode="create")
            owner.demand(self._fs.cat_file(path), self.root)
        self._claimed = True

    def begin(self, step: int) -> str:
        """The next `step-N.try-K`; a folder exists with its first object. See `Store`."""
        self.claim()
        with explained(f"no checkpoint of step {step} can be begun", self.root):
            used = {parse(name) for name in self._folders()} | self._begun
        name = next(n for n in (FolderName(step, "try", k) for k in count(1)) if n not in used)
        self._begun.add(name)
        return str(name)

    def write(self, folder: str, name: str, parts: Iterable[Buffer]) -> None:
        """Upload an object, a large one in parts. See `Store`."""
        with explained(f"{folder}/{name} cannot be written", self.root):
            file = self._fs.open(self._of(folder, name), "wb", block_size=self._part_bytes)
            try:
                for part in parts:
                    for block in _blocks(part, self._part_bytes):
                        file.write(block)
                file.close()
            except BaseException:
                _abandon(file)
                raise

    def read(self, folder: str, name: str, first: int = 0, last: int | None = None) -> bytes:
        """Fetch only what is asked for. See `Store`."""
        if last is None and first:
            last = self.size(folder, name)
        if last is not None and last <= first:
            return b""
        with explained(f"{folder}/{name} cannot be read", self.root):
            path = self._of(folder, name)
            if last is None:
                return self._fs.cat_file(path)
            data = self._range(path, first, last)
        if len(data) < last - first:
            there = self.size(folder, name)
            raise CheckpointError(
                f"{folder}/{name} at {self} is cut short: {there:,} bytes of {last:,}",
                "go on from another checkpoint; `longspan checkpoint ls` shows them",
            )
        return data

    def size(self, folder: str, name: str) -> int:
        """The bytes of an object. See `Store`."""
        with explained(f"{folder}/{name} cannot be read", self.root):
            return self._fs.info(self._of(folder, name))["size"]

    def files(self, folder: str) -> dict[str, int]:
        """Names and sizes. See `Store`."""
        with explained(f"{folder} cannot be read", self.root):
            return self._folders(folder).get(folder, {})

    def commit(self, folder: str, step: int, marker: bytes) -> str:
        """Upload the marker, then the pointer. See `Store`."""
        with explained(f"{folder} cannot be committed", self.root):
            for other in self.committed():
                name = parse(other)
                if name is not None and name.step == step and other != folder:
                    raise CheckpointError(
                        f"step {step} is already complete at {self}: {other}",
                        "remove it, or set it aside",
                    )
            self._mark(self._of(folder, MARKER), marker)
        self.point(folder)
        return folder

    def point(self, folder: str) -> None:
        """Upload the pointer. See `Store`."""
        with suppress(Exception):
            self._fs.pipe_file(f"{self._path}/{LATEST}", f"{folder}\n".encode())

    def listing(self) -> dict[str, Kind]:
        """All folders, oldest first. See `Store`."""
        with explained("checkpoints cannot be listed", self.root):
            folders = self._folders()
        names = {name: parsed for name in folders if (parsed := parse(name)) is not None}
        ordered = sorted(names, key=lambda name: names[name].order)
        return {name: _kind(folders[name]) for name in ordered}

    def committed(self) -> list[str]:
        """Complete ones. See `Store`."""
        return [name for name, kind in self.listing().items() if kind == "committed"]

    def unfinished(self) -> list[str]:
        """Attempts left behind. See `Store`."""
        return [name for name, kind in self.listing().items() if kind == "unfinished"]

    def remove(self, folder: str) -> None:
        """Delete the marker, then the rest. See `Store`."""
        with explained(f"{folder} cannot be removed", self.root):
            names = self._folders(folder).get(folder, {})
            for name in sorted(names, key=lambda name: (name != MARKER, name == ASIDE, name)):
                with suppress(FileNotFoundError):
                    self._fs.rm_file(self._of(folder, name))

    def set_aside(self, folder: str) -> str:
        """Replace the marker; the folder keeps its name. See `Store`."""
        with explained(f"{folder} cannot be set aside", self.root):
            self._fs.pipe_file(self._of(folder, ASIDE), b"set aside\n")
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._of(folder, MARKER))
        return folder

    def free(self) -> int | None:
        """Nobody knows. See `Store`."""
        return None

    def _of(self, folder: str, name: str) -> str:
        return f"{self._path}/{folder}/{name}"

    def _folders(self, folder: str = "") -> dict[str, dict[str, int]]:
        """Names and sizes of the objects of every folder, or of one."""
        where = f"{self._path}/{folder}".rstrip("/")
        self._fs.invalidate_cache()
        try:
            found: dict[str, dict[str, Any]] = self._fs.find(where, detail=True)
        except FileNotFoundError:
            if not self._fs.exists(self._path.split("/")[0]):
                raise
            found = {}
        folders: dict[str, dict[str, int]] = {}
        for path, info in found.items():
            place, _, name = path.removeprefix(f"{self._path}/").partition("/")
            if parse(place) is not None and name and "/" not in name:
                folders.setdefault(place, {})[name] = info["size"]
        return folders

    def _range(self, path: str, first: int, last: int) -> bytes:
        """Bytes of an object; none where it ends before `first`, which S3 calls an error."""
        try:
            return self._fs.cat_file(path, start=first, end=last)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return b""

    def _mark(self, path: str, marker: bytes) -> None:
        """Upload the marker; an answer that was lost on the way is asked for again."""
        try:
            self._fs.pipe_file(path, marker)
        except Exception:
            try:
                there = self._fs.cat_file(path)
            except Exception:
                there = None
            if there != marker:
                raise


def _connect(url: str) -> tuple[Any, str]:
    """fsspec's file system behind a URL, and the path in it."""
    try:
        import fsspec

        return fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise RunError(
            f"checkpoints at {redacted(url)} need a package that is missing: {error.name or error}",
            'pip install "longspan[s3]" for S3; other stores: the package that fsspec names',
        ) from error
    except ValueError as error:
        raise RunError(
            f"checkpoints cannot be at {redacted(url)}: {redacted(str(error))}",
            "checkpoint.where: a folder, or a URL such as s3://bucket/prefix",
        ) from error


def _kind(files: dict[str, int]) -> Kind:
    """What a folder is by the objects that it has."""
    if ASIDE in files:
        return "aside"
    return "committed" if MARKER in files else "unfinished"


def _blocks(part: Buffer, size: int) -> Iterable[memoryview]:
    """A buffer in pieces, so that an upload copies one of them at a time."""
    view = memoryview(part)
    flat = view.cast("B") if view.nbytes else view
    return (flat[first : first + size] for first in range(0, view.nbytes, size))


def _abandon(file: Any) -> None:
    """Give up an upload; closing the file would complete it with what it has."""
    with suppress(Exception):
        file.discard()
    file.closed = True
