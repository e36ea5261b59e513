"""LocalStore: checkpoints in folders of a file system, local or NFS, committed by a rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from .folders import LATEST, MARKER, FolderName, Kind, parse, step_of
from .owner import OWNER, Owner
from .system_errors import explained

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """A `Store` in a folder.

    An attempt is `step-N.tmp-K`. Its files are synced as they are written, then its marker, then
    the folder; the rename to `step-N` commits it, and the root is synced.

    Args:
        root: The folder of all checkpoints; made when the first attempt begins.
        run_dir: The run that owns it; None where the run's own lock is enough.
    """

    def __init__(self, root: Path, run_dir: Path | None = None) -> None:
        self.path, self.root = root, str(root)
        self._run_dir, self._claimed = run_dir, run_dir is None

    def __str__(self) -> str:
        return self.root

    def claim(self) -> None:
        """Make the folder this run's. See `Store`."""
        if self._claimed:
            return
        assert self._run_dir is not None
        with explained("checkpoints cannot be written", self.root):
            self._make_root()
            owner, file = Owner.of(self._run_dir), self.path / OWNER
            if not file.exists():
                _write_once(file, owner)
            owner.demand(file.read_bytes(), self.root)
            _unfinished(file, owner).unlink(missing_ok=True)  # of a launch that was killed here
        self._claimed = True

    def begin(self, step: int) -> str:
        """A new `step-N.tmp-K`. See `Store`."""
        self.claim()
        with explained(f"no checkpoint of step {step} can be begun", self.root):
            self._make_root()
            name = str(FolderName(step, "tmp", self._number(step, "tmp")))
            (self.path / name).mkdir()
            return name

    def write(self, folder: str, name: str, parts: Iterable[Buffer]) -> None:
        """Write and sync a new file. See `Store`."""
        with explained(f"{folder}/{name} cannot be written", self.root):
            _write(self._file(folder, name), parts)

    def read(self, folder: str, name: str, first: int = 0, last: int | None = None) -> bytes:
        """Read only what is asked for. See `Store`."""
        with explained(f"{folder}/{name} cannot be read", self.root):
            handle = os.open(self._file(folder, name), os.O_RDONLY)
            try:
                end = os.fstat(handle).st_size if last is None else last
                data = _read(handle, first, end)
            finally:
                os.close(handle)
        if len(data) < end - first:
            raise CheckpointError(
                f"{folder}/{name} at {self} is cut short: {first + len(data):,} bytes of {end:,}",
                "go on from another checkpoint; `longspan checkpoint ls` shows them",
            )
        return data

    def size(self, folder: str, name: str) -> int:
        """The bytes of a file. See `Store`."""
        with explained(f"{folder}/{name} cannot be read", self.root):
            return self._file(folder, name).stat().st_size

    def files(self, folder: str) -> dict[str, int]:
        """Names and sizes. See `Store`."""
        with (
            explained(f"{folder} cannot be read", self.root),
            os.scandir(self._of(folder)) as found,
        ):
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}

    def commit(self, folder: str, step: int, marker: bytes) -> str:
        """Marker, sync, rename, sync, pointer. See `Store`."""
        target, part = str(FolderName(step)), self._of(folder)
        with explained(f"{target} cannot be committed", self.root):
            if (self.path / target).exists():
                if self._marked(target):
                    raise CheckpointError(
                        f"{target} is already complete at {self}", "remove it, or set it aside"
                    )
                self.set_aside(target)
            _write(part / MARKER, [marker])
            _sync(part)
            part.rename(self.path / target)
            try:
                _sync(self.path)
            except OSError:
                # Nobody knows whether it would outlast a power cut: then it is not committed.
                (self.path / target).rename(part)
                raise
        self.point(target)
        return target

    def point(self, folder: str) -> None:
        """Swap the pointer, unless it is right. See `Store`."""
        pointer, wanted = self.path / LATEST, f"{folder}\n".encode()
        with suppress(OSError):
            if not pointer.is_file() or pointer.read_bytes() != wanted:
                temporary = self.path / f"{LATEST}.writing"
                temporary.unlink(missing_ok=True)
                _write(temporary, [wanted])
                temporary.replace(pointer)
                _sync(self.path)

    def listing(self) -> dict[str, Kind]:
        """All folders, oldest first. See `Store`."""
        found: dict[FolderName, Kind] = {}
        with explained("checkpoints cannot be listed", self.root):
            for entry in self._entries():
                name = parse(entry)
                if name is None:
                    continue
                if not name.suffix:
                    found[name] = "committed" if self._marked(entry) else "damaged"
                elif name.suffix in ("tmp", "aside"):
                    found[name] = "unfinished" if name.suffix == "tmp" else "aside"
        return {str(name): found[name] for name in sorted(found, key=lambda name: name.order)}

    def committed(self) -> list[str]:
        """Complete ones. See `Store`."""
        return [name for name, kind in self.listing().items() if kind == "committed"]

    def unfinished(self) -> list[str]:
        """Attempts left behind. See `Store`."""
        return [name for name, kind in self.listing().items() if kind == "unfinished"]

    def remove(self, folder: str) -> None:
        """Delete a folder under the name of an attempt. See `Store`."""
        with explained(f"{folder} cannot be removed", self.root):
            if not (self._of(folder)).exists():
                return
            name = parse(folder)
            if name is None or name.suffix != "tmp":
                # Under another name first, and durably: half of it is never under the old one.
                folder = self._renamed(folder, "tmp")
            (self._of(folder) / MARKER).unlink(missing_ok=True)
            shutil.rmtree(self._of(folder))

    def set_aside(self, folder: str) -> str:
        """Rename to `step-N.aside-K`. See `Store`."""
        with explained(f"{folder} cannot be set aside", self.root):
            return self._renamed(folder, "aside")

    def free(self) -> int | None:
        """Bytes that this user can still write. See `Store`."""
        there = self.path
        while not there.exists() and there != there.parent:
            there = there.parent
        with explained("the free space is unknown", self.root):
            found = os.statvfs(there)
            return found.f_bavail * found.f_frsize

    def _of(self, folder: str) -> Path:
        return self.path / _plain(folder)

    def _file(self, folder: str, name: str) -> Path:
        return self._of(folder) / _plain(name)

    def _entries(self) -> list[str]:
        """Names of the root's folders."""
        try:
            with os.scandir(self.path) as found:
                return [entry.name for entry in found if entry.is_dir()]
        except FileNotFoundError:
            return []

    def _marked(self, folder: str) -> bool:
        """Whether the marker is there. What cannot be read is an error, never "no"."""
        try:
            # Opened, not looked up: an NFS client may answer a lookup from its cache.
            os.close(os.open(self.path / folder / MARKER, os.O_RDONLY))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _number(self, step: int, suffix: str) -> int:
        """The first number that no folder of this step and suffix has."""
        used = {parse(entry) for entry in self._entries()}
        return next(n for n in count(1) if FolderName(step, suffix, n) not in used)

    def _renamed(self, folder: str, suffix: str) -> str:
        """Give a folder another suffix, durably."""
        step = step_of(folder)
        name = str(FolderName(step, suffix, self._number(step, suffix)))
        self._of(folder).rename(self.path / name)
        _sync(self.path)
        return name

    def _make_root(self) -> None:
        """The root and the folders above it, durably."""
        missing = []
        there = self.path
        while not there.is_dir():
            missing.append(there)
            there = there.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync(path.parent)


def _plain(name: str) -> str:
    """A name that stays in its folder: manifests are read from outside.

    Raises:
        CheckpointError: It does not.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise CheckpointError(
            f"{name!r} is no name of a file of a checkpoint",
            "go on from another checkpoint; `longspan checkpoint ls` shows them",
        )
    return name


def _write(path: Path, parts: Iterable[Buffer]) -> None:
    """Write a file that does not exist yet, and sync it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            view = memoryview(part)
            rest = view.cast("B") if view.nbytes else view
            while rest.nbytes:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(handle: int, first: int, end: int) -> bytes:
    """What a file has between two offsets; a single read may return less than is there."""
    blocks = []
    while first < end and (block := os.pread(handle, end - first, first)):
        blocks.append(block)
        first += len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _write_once(file: Path, owner: Owner) -> None:
    """Write the owner file whole, unless another run was first."""
    temporary = _unfinished(file, owner)
    temporary.unlink(missing_ok=True)
    _write(temporary, [owner.content])
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with suppress(FileExistsError):
            _write(file, [owner.content])
    finally:
        temporary.unlink()
    _sync(file.parent)


def _unfinished(file: Path, owner: Owner) -> Path:
    """Where an owner writes the file before it is there."""
    return file.with_name(f"{file.name}.{owner.id}")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
