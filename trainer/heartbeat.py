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

Section = Literal[
    "start_up", "open", "canary", "first_step", "step", "evaluation", "save", "proof", "end"
]
"""What a rank can be at: imports and joining, data and model, then the parts of a stage."""

_SECTIONS: tuple[Section, ...] = get_args(Section)
# Times before the first step of a stage: compilers and caches make that one slow.
_BEFORE_STEPS = ("start_up", "open", "canary")
LEARNED = ("canary", "first_step", "step", "evaluation")
"""What takes about as long each time in a stage, and in another one, of another length, does not.

How long it takes to open a stage depends on what is cached where, and a save waits for storage."""

_SMOOTHING = 0.1
_FORM = struct.Struct(f"<QBxH4xqdd{len(_SECTIONS)}dQ")


@dataclass(frozen=True)
class Beat:
    """One look at a rank.

    Attributes:
        section: What it is at.
        stage: The number of the stage that is open, from 0.
        step: The step of the run that it works on; 0 before the first.
        begun: When it began that, in seconds of the machine's monotonic clock.
        own_s: Seconds of a step that it computes and does not wait for others, over the last ones.
        longest: The longest time in each section that it has left in this stage, in seconds; 0
            where it was not there yet.
    """

    section: Section
    stage: int
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
        self._stage, self._begun, self._own_s = 0, time.monotonic(), 0.0
        self._left: dict[int, dict[Section, float]] = {}
        """What was learned of stages that are not open: a run may go back to one."""
        self._memory: mmap.mmap | None = None
        if path is not None:
            self._memory = _mapped(path)
        self._write(0)

    def enter(self, section: Section, step: int = 0, stage: int | None = None) -> None:
        """The rank begins something, which ends what it was at.

        Args:
            section: What; a step that follows no other one of its stage is a first one.
            step: Of the run, that it works on.
            stage: The number of the stage that is opened; None: it is the same one.
        """
        now = time.monotonic()
        longest = self._longest[self._section]
        self._longest[self._section] = max(longest, now - self._begun)
        if stage is not None:
            self._open(stage)
        if section == "step" and self._section in _BEFORE_STEPS:
            section = "first_step"
        self._section, self._begun = section, now
        self._write(step)

    def _open(self, stage: int) -> None:
        """Go on with what is known of a stage; what belongs to none stays."""
        self._left[self._stage] = {name: self._longest[name] for name in LEARNED}
        known = self._left.get(stage, dict.fromkeys(LEARNED, 0.0))
        self._longest |= known
        self._stage, self._own_s = stage, 0.0

    def computed(self, seconds: float) -> None:
        """What the rank computed itself of a step, in seconds; 0 where it is not known."""
        if seconds > 0:
            weight = _SMOOTHING if self._own_s > 0 else 1.0
            self._own_s += weight * (seconds - self._own_s)

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
            self._stage,
            step,
            self._begun,
            self._own_s,
            *self._longest.values(),
            self._count,
        )


def learned(beat: Beat) -> dict[str, float]:
    """What a beat says of how long things take, to be kept: `step 0` is a step of stage 0."""
    return {
        f"{name} {beat.stage}": beat.longest[name]
        for name in LEARNED
        if beat.longest.get(name, 0.0) > 0
    }


def open_heartbeat() -> Heartbeat:
    """The heartbeat that the environment asks for; a silent one where it asks for none."""
    path = os.environ.get(HEARTBEAT)
    try:
        return Heartbeat(Path(path) if path else None)
    except (OSError, ValueError):
        # Whoever watches sees nothing then; the run itself needs no heartbeat.
        return Heartbeat()


def read_beat(path: Path) -> Beat | None:
    """The last beat of a rank; None before the first one, and while one is being written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < _FORM.size:
        return None
    first, number, stage, step, begun, own_s, *longest, last = _FORM.unpack_from(content)
    if first != last or not first or number >= len(_SECTIONS):
        return None
    known = dict(zip(_SECTIONS, longest, strict=True))
    return Beat(_SECTIONS[number], stage, step, begun, own_s, known)


def _mapped(path: Path) -> mmap.mmap:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Written, not only given a size: a full disk shows here, and does not end the rank later.
        os.write(handle, bytes(_FORM.size))
        return mmap.mmap(handle, _FORM.size)
    finally:
        os.close(handle)
