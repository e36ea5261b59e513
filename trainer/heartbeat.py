"""Heartbeat: what a rank does now, in a small file that whoever watches it reads without asking.

A beat is a write to memory: no system call, no wait, nothing that a step would notice.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

HEARTBEAT = "LONGSPAN_HEARTBEAT"
"""The environment variable that names the file of a rank; without it nothing is written."""

Section = Literal["start_up", "open", "canary", "step", "evaluation", "save", "proof", "end"]
"""What a rank can be at: imports and joining, data and model, then the parts of a stage."""

_SECTIONS: tuple[Section, ...] = get_args(Section)
# Times before the first step of a stage: compilers and caches make that one slow.
_BEFORE_STEPS = ("start_up", "open", "canary")
_SMOOTHING = 0.1
_FORM = struct.Struct(f"<QBB6xqdd{len(_SECTIONS)}dQ")


@dataclass(frozen=True)
class Beat:
    """One look at a rank.

    Attributes:
        section: What it is at.
        warm: Whether it has been there before, so that its time then says what to expect.
        step: The step of the run that it works on; 0 before the first.
        begun: When it began that, in seconds of the machine's monotonic clock.
        own_s: Seconds of a step that it computes and does not wait for others, over the last ones.
        longest: The longest time in each section that it has left, in seconds.
    """

    section: Section
    warm: bool
    step: int
    begun: float
    own_s: float
    longest: Mapping[Section, float] = field(default_factory=dict)


class Heartbeat:
    """Writes where a rank is.

    Args:
        path: The file; None writes nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._count, self._longest = 0, dict.fromkeys(_SECTIONS, 0.0)
        self._section: Section = "start_up"
        self._warm, self._begun, self._own_s = False, time.monotonic(), 0.0
        self._cold = False
        """Whether all that is known of steps is the first one, which is slower than the others."""
        self._memory: mmap.mmap | None = None
        if path is not None:
            self._memory = _mapped(path)
        self._write(0)

    def enter(self, section: Section, step: int = 0) -> None:
        """The rank begins something, which ends what it was at.

        Args:
            section: What.
            step: Of the run, that it works on.
        """
        now = time.monotonic()
        self._note(now - self._begun, section)
        cold = section == "step" and self._section in _BEFORE_STEPS
        self._warm = self._longest[section] > 0 and not cold
        self._section, self._begun = section, now
        self._write(step)

    def computed(self, seconds: float) -> None:
        """What the rank computed itself of a step, in seconds; 0 where it is not known."""
        if seconds > 0:
            weight = _SMOOTHING if self._own_s > 0 else 1.0
            self._own_s += weight * (seconds - self._own_s)

    def _note(self, seconds: float, following: Section) -> None:
        """Learn from a section that ends how long it may take."""
        if following == "open":  # another stage: what the last one took says nothing of it
            self._longest, self._own_s = dict.fromkeys(_SECTIONS, 0.0), 0.0
        elif self._section != "step":
            self._longest[self._section] = max(self._longest[self._section], seconds)
        elif not self._warm:
            self._longest["step"], self._cold = seconds, True
        else:
            before = 0.0 if self._cold else self._longest["step"]
            self._longest["step"], self._cold = max(before, seconds), False

    def _write(self, step: int) -> None:
        if self._memory is None:
            return
        # The same number at both ends of a record that is whole.
        self._count += 1
        number = _SECTIONS.index(self._section)
        _FORM.pack_into(
            self._memory,
            0,
            self._count,
            number,
            self._warm,
            step,
            self._begun,
            self._own_s,
            *self._longest.values(),
            self._count,
        )


def open_heartbeat() -> Heartbeat:
    """The heartbeat that the environment asks for; a silent one where it asks for none."""
    path = os.environ.get(HEARTBEAT)
    try:
        return Heartbeat(Path(path) if path else None)
    except (
        OSError,
        ValueError,
    ):  # whoever watches sees nothing then; the run itself needs no heartbeat
        return Heartbeat()


def read_beat(path: Path) -> Beat | None:
    """The last beat of a rank; None before the first one, and while one is being written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < _FORM.size:
        return None
    first, number, warm, step, begun, own_s, *longest, last = _FORM.unpack_from(content)
    if first != last or not first or number >= len(_SECTIONS):
        return None
    known = dict(zip(_SECTIONS, longest, strict=True))
    return Beat(_SECTIONS[number], bool(warm), step, begun, own_s, known)


def _mapped(path: Path) -> mmap.mmap:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Written, not only given a size: a full disk shows here, and does not end the rank later.
        os.write(handle, bytes(_FORM.size))
        return mmap.mmap(handle, _FORM.size)
    finally:
        os.close(handle)
