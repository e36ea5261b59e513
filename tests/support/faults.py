"""Faults: every file operation of a process is a point at which somebody can be killed.

Python tells of most operations before they are done (audit events); writes and syncs are told of
by wrappers of `os` and of `open`. So a file that somebody adds is covered. What C code writes by
itself is not seen: `unseen_files` finds it.
"""

import io
import json
import mmap
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

BEFORE, HALF, AFTER = "before", "half", "after"
ONE, OTHER, ALL, LAUNCHER = "one rank", "the other ranks", "all ranks", "the launcher"
SLOTS = 16
_PAIRS = ("os.rename", "os.link", "os.symlink")
_DESCRIPTORS = ("os.truncate", "fcntl.flock", "fcntl.lockf", "fcntl.fcntl")
_VARYING = (
    (re.compile(r"step-\d+"), "step-N"),
    (re.compile(r"(tmp|try|aside)-\d+"), r"\1-K"),
    (re.compile(r"\b[0-9a-f]{12,}\b"), "HASH"),
)
_real_write, _real_open = os.write, io.open


@dataclass(frozen=True)
class Point:
    """A place in a process's work.

    Attributes:
        role: `launcher` or `rank N`.
        label: Function, operation and file, without what differs between attempts.
        when: Before it, after it, or when half of a write is done.
    """

    role: str
    label: str
    when: str


@dataclass(frozen=True)
class Fault:
    """Who is killed at the n-th time (from 1) that a point is reached."""

    point: Point
    nth: int
    victim: str


class Pids:
    """The processes of an attempt, in a file that all of them have mapped: launcher, rank 0, ..."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * SLOTS))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8 * SLOTS)

    def __getitem__(self, slot: int) -> int:
        return int.from_bytes(self._map[8 * slot : 8 * slot + 8], "little")

    def __setitem__(self, slot: int, pid: int) -> None:
        self._map[8 * slot : 8 * slot + 8] = pid.to_bytes(8, "little")

    def clear(self) -> None:
        """Forget an earlier attempt."""
        self._map[:] = bytes(8 * SLOTS)

    @property
    def launcher(self) -> int:
        return self[0]

    @property
    def ranks(self) -> list[int]:
        return [pid for pid in map(self.__getitem__, range(1, SLOTS)) if pid]


class Tracer:
    """Counts the points that this process reaches, writes them down and strikes at the fault.

    Args:
        slot: 0 for the launcher, else the rank plus 1.
        control: A folder for traces and process numbers, none of the roots.
        roots: The folders whose files matter.
        fault: Where to strike, if anywhere.
    """

    def __init__(self, slot: int, control: Path, roots: list[Path], fault: Fault | None) -> None:
        self.slot, self.fault = slot, fault
        self.role = "launcher" if slot == 0 else f"rank {slot - 1}"
        self.roots = [(root.name, os.path.realpath(root)) for root in roots]
        self.phase = ""
        self._counts: Counter[Point] = Counter()
        self._lock = threading.RLock()  # a signal may come in between
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._trace = os.open(control / f"trace-{slot}.jsonl", flags, 0o644)
        self._pids = Pids(control / "pids")
        self._pids[slot] = os.getpid()

    def name(self, path: object, directory: int = -1) -> str | None:
        """A path as a label has it, or None outside of the roots."""
        if isinstance(path, int):
            path = _path_of(path)
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        at = os.fsdecode(path)
        if directory >= 0:
            at = os.path.join(_path_of(directory) or "", at)  # noqa: PTH118
        at = os.path.abspath(at)  # noqa: PTH100  Path.absolute keeps `..`
        for name, root in self.roots:
            if at == root or at.startswith(root + os.sep):
                at = name + at[len(root) :]
                for varying, instead in _VARYING:
                    at = varying.sub(instead, at)
                return at
        return None

    def reach(self, what: str) -> str:
        """An operation comes up. Returns its label."""
        label = f"{self.phase}{_where()}: {what}"
        if self.is_fault(label, BEFORE):
            self.strike()
        return label

    def is_fault(self, label: str, when: str) -> bool:
        """Whether this is the fault; the point is counted and written down."""
        point = Point(self.role, label, when)
        with self._lock:
            self._counts[point] += 1
            count = self._counts[point]
        line = {**asdict(point), "count": count, "time": time.monotonic()}
        _real_write(self._trace, json.dumps(line).encode() + b"\n")
        fault = self.fault
        return fault is not None and (fault.point, fault.nth) == (point, count)

    def strike(self) -> None:
        """Kill the victims; returns only where this process is none of them."""
        assert self.fault is not None
        fault, self.fault = self.fault, None
        _real_write(self._trace, b'{"struck": true}\n')
        me = os.getpid()
        if fault.victim == LAUNCHER:
            os.kill(self._pids.launcher, signal.SIGKILL)
        elif fault.victim == ONE:
            os.kill(me, signal.SIGKILL)
        else:
            for pid in self._pids.ranks:
                if pid != me:
                    os.kill(pid, signal.SIGKILL)
            if fault.victim == OTHER or self.slot == 0:
                return
            os.kill(me, signal.SIGKILL)
        # A rank ends with its launcher; until then it must not go on.
        while True:
            time.sleep(60)


_tracer: Tracer | None = None
_here = threading.local()


def arm(slot: int, control: Path, roots: list[Path], fault: Fault | None) -> Tracer:
    """Begin to trace this process."""
    global _tracer
    _tracer = None
    _tracer = Tracer(slot, control, roots, fault)
    return _tracer


def install() -> None:
    """Wrap what tells of file operations; once, and before anybody imports functions of `os`."""
    sys.addaudithook(_on_audit)
    for name in ("rename", "replace", "remove", "unlink", "mkdir", "rmdir", "link", "symlink"):
        _wrap(name, _told_after)
    for name in ("fsync", "fdatasync", "writev", "pwritev"):
        _wrap(name, _told_before)
    for name in ("write", "pwrite"):
        _wrap(name, _written)
    _wrap("copy_file_range", _copied)
    _wrap("sendfile", _sent)
    io.open = open_traced
    __builtins__["open"] = open_traced  # type: ignore


def _wrap(name: str, around) -> None:
    real = getattr(os, name, None)
    if real is None:
        return

    def wrapper(*args, **kwargs):
        if _tracer is None:
            return real(*args, **kwargs)
        return around(_tracer, name, real, *args, **kwargs)

    setattr(os, name, wrapper)
    for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if real in able:
            able.add(wrapper)


def _on_audit(event: str, args: tuple) -> None:
    tracer = _tracer
    if tracer is None or not (event == "open" or event.startswith(("os.", "fcntl."))):
        return
    if not args or (isinstance(args[0], int) and event not in _DESCRIPTORS):
        return
    if event in _PAIRS:
        folders = args[2:4] if len(args) > 3 else (-1, -1)
        names = [tracer.name(args[at], folders[at]) for at in (0, 1)]
    else:
        folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
        names = [tracer.name(args[0], folder)]
    if not any(names):
        return
    if event == "open":
        event = "read" if args[2] & os.O_ACCMODE == os.O_RDONLY else "open"
    said = " -> ".join(name or "elsewhere" for name in names)
    _here.last = tracer.reach(f"{event.removeprefix('os.')} {said}")


def _told_after(tracer: Tracer, name: str, real, *args, **kwargs):
    _here.last = None
    done = real(*args, **kwargs)
    if _here.last is not None and tracer.is_fault(_here.last, AFTER):
        tracer.strike()
    return done


def _told_before(tracer: Tracer, name: str, real, descriptor, *args, **kwargs):
    if (file := tracer.name(_number(descriptor))) is not None:
        tracer.reach(f"{name} {file}")
    return real(descriptor, *args, **kwargs)


def _copied(tracer: Tracer, name: str, real, source: int, target: int, *args, **kwargs):
    if (file := tracer.name(target)) is not None:
        tracer.reach(f"{name} {file}")
    return real(source, target, *args, **kwargs)


def _written(tracer: Tracer, name: str, real, descriptor: int, data, *args):
    if (file := tracer.name(descriptor)) is None:
        return real(descriptor, data, *args)
    view = memoryview(data).cast("B")
    with _halfway(tracer, f"write {file}", len(view)) as size:
        return real(descriptor, view[:size], *args)


def _sent(tracer: Tracer, name: str, real, out: int, source: int, offset, count: int, *args):
    if (file := tracer.name(_number(out))) is None:
        return real(out, source, offset, count, *args)
    left = max(0, os.fstat(source).st_size - (offset or 0))
    with _halfway(tracer, f"write {file}", min(count, left)) as size:
        return real(out, source, offset, size, *args)


class _halfway:
    """Gives the bytes to write, and strikes after half of them where that is the fault."""

    def __init__(self, tracer: Tracer, what: str, size: int) -> None:
        self.tracer, self.size = tracer, size
        label = tracer.reach(what)
        self.strikes = size > 1 and tracer.is_fault(label, HALF)

    def __enter__(self) -> int:
        return self.size // 2 if self.strikes else self.size

    def __exit__(self, *error) -> None:
        if self.strikes:
            self.tracer.strike()


class _File(io.FileIO):
    """A file whose writes are points."""

    def write(self, data) -> int:
        if _tracer is None:
            return super().write(data)
        return _written(_tracer, "write", lambda _, part: super(_File, self).write(part),
                        self.fileno(), data)  # fmt: skip


def open_traced(
    file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True,
    opener=None,
):  # fmt: skip
    """`open`, whose files tell of their writes."""
    writes = set(mode) & set("wax+")
    if _tracer is None or not writes or _tracer.name(file) is None:
        return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = _File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
    if "b" in mode:
        return buffer
    text = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode  # type: ignore
    return text


def _number(file) -> int:
    return file if isinstance(file, int) else file.fileno()


def _path_of(descriptor: int) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return None


def _where() -> str:
    """The innermost function of longspan that is at work in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("longspan."):
            function = frame.f_code.co_qualname.partition(".<locals>")[0]
            return f"{module.removeprefix('longspan.')}.{function}"
        frame = frame.f_back
    return "library"


def read_trace(control: Path) -> tuple[Counter[Point], bool]:
    """The points of an attempt in the order of their first time, how often, and whether it struck.

    A line that a kill cut off is left out.
    """
    entries, struck = [], False
    for path in sorted(control.glob("trace-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            struck = struck or "struck" in entry
            if "struck" not in entry:
                entries.append(entry)
    entries.sort(key=lambda entry: entry["time"])
    return Counter(Point(e["role"], e["label"], e["when"]) for e in entries), struck


def unseen_files(root: Path, points: Iterable[Point]) -> list[str]:
    """Files that are there though no point names them: C code wrote them by itself."""
    labels = [point.label for point in points]
    seen = {word for label in labels for word in label.split()}
    for source, target in (label.split()[-3::2] for label in labels if " -> " in label):
        # A file that was written elsewhere came by a rename of its folder.
        seen |= {target + name[len(source) :] for name in seen if name.startswith(source + "/")}
    names = [f"{root.name}/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()]
    for varying, instead in _VARYING:
        names = [varying.sub(instead, name) for name in names]
    return sorted(set(names) - seen)
