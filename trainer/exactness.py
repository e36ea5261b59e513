"""Exactness: how much of what a run would have computed a resume keeps, and what decides it.

E2: bit for bit, which needs the same layout and operations that add up in the same order every
time. E1: the same data in the same order under the same schedule, whatever the layout and the
machine; sums round differently. E0: weights and moments, but other data or another schedule.
No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import CheckpointError, RunError
from .changes import changes

Level = Literal["E0", "E1", "E2"]
"""From the least to the most; they compare as strings."""

MEANING: dict[Level, str] = {
    "E2": "bit-exact",
    "E1": "same data and schedule",
    "E0": "weights and moments only",
}

CONSENT = "LONGSPAN_EXACTNESS"
"""The environment variable that hands the ranks the level that one resume may fall to."""

_GPU = "on a GPU, sums by atomics and the algorithms of NCCL and cuBLAS are not proven to repeat"
_MOST_REASONS = 12


@dataclass(frozen=True)
class Conditions:
    """What decides how exactly a run goes on, as values that JSON has.

    Attributes:
        machine: What computes: ranks, device, processor, threads, precision, versions.
        layout: How the stage is spread over the ranks.
        course: The run's settings that decide what is learned: its seed and model.
        stage: The stage's settings that do: length, batch, learning rate, attention, RoPE.
        data: Keys of the documents and the tokenizer, and of the order of the sequences so far.
    """

    machine: Mapping[str, Any]
    layout: Mapping[str, Any]
    course: Mapping[str, Any]
    stage: Mapping[str, Any]
    data: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)


@dataclass(frozen=True)
class Promise:
    """What a run promised at its start, and what it has kept up to now.

    Attributes:
        declared: The level in the header of the attempt that began with the first step.
        level: The lowest that any of its resumes had.
        reasons: Why it is lower than declared.
    """

    declared: Level
    level: Level
    reasons: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"declared": self.declared, "level": self.level, "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Resume:
    """How a run goes on from a checkpoint.

    Attributes:
        level: Of this resume.
        reasons: Why it is not bit-exact.
        promise: Of the whole run, this resume included.
    """

    level: Level
    reasons: tuple[str, ...]
    promise: Promise

    @property
    def words(self) -> str:
        """The level, with the reasons below it."""
        text = f"exactness {described(self.level)}"
        if self.promise.level < self.level:
            text += f"; an earlier resume makes the run as a whole {self.promise.level}"
        return "\n  ".join([text, *_shown(self.reasons)])


def described(level: Level) -> str:
    """A level with its meaning: `E2 (bit-exact)`."""
    return f"{level} ({MEANING[level]})"


def read_level(text: str, name: str) -> Level:
    """A level that somebody wrote.

    Args:
        text: What was written.
        name: Where, for the message.

    Raises:
        RunError: It is none.
    """
    for known in get_args(Level):
        if text == known:
            return known
    levels = ", ".join(f"{level} ({meaning})" for level, meaning in MEANING.items())
    raise RunError(f"{name} is {text}, which is no level of exactness", f"use one of {levels}")


def declared(device: str) -> tuple[Level, str]:
    """What a run promises at best, and why not more.

    Args:
        device: Kind of device that all ranks compute on: `cpu`, `cuda`.
    """
    return ("E2", "") if device == "cpu" else ("E1", _GPU)


def level(saved: Conditions, now: Conditions, *, inside: bool) -> tuple[Level, tuple[str, ...]]:
    """How exactly a run goes on under other conditions, and why not bit for bit.

    Args:
        saved: When the checkpoint was written.
        now: Of this attempt.
        inside: Whether it goes on in the checkpoint's stage. Another stage may have other data,
            another schedule and another layout: that is the recipe's wish.
    """
    learned = ["course", "stage", "data"] if inside else ["course"]
    computed = ["machine", "layout"] if inside else ["machine"]
    lost, moved = (
        [line for name in names for line in changes(getattr(saved, name), getattr(now, name))]
        for names in (learned, computed)
    )
    best, reason = declared(str(now.machine.get("device")))
    reasons = (*lost, *moved, *([reason] if reason else []))
    if lost:
        return "E0", reasons
    return ("E1" if moved else best), reasons


def allow(asked: Level | None) -> None:
    """Let the ranks of this launch, and of no other, go on at a level; None: as the run says."""
    if asked is None:
        os.environ.pop(CONSENT, None)
    else:
        os.environ[CONSENT] = asked


def go_on(
    state: Mapping[str, Any],
    now: Conditions,
    *,
    inside: bool,
    setting: Level | None,
    checkpoint: str,
    run: str,
) -> Resume:
    """The resume from a checkpoint, unless it falls below what is allowed.

    Allowed is what this launch was told, else what the recipe says, else what the run declared.

    Args:
        state: What the checkpoint says of itself.
        now: Conditions of this attempt.
        inside: As of `level`.
        setting: The recipe's `checkpoint.exactness`.
        checkpoint: Its name, for messages.
        run: The run's folder as a user would type it.

    Raises:
        RunError: It would fall below that; the message names what changed.
        CheckpointError: What it says of its conditions cannot be read.
    """
    if "conditions" not in state:
        found: Level = "E0"
        reasons: tuple[str, ...] = (f"{checkpoint} does not say under what it was written",)
        promise = Promise("E0", "E0", reasons)
    else:
        saved, promise = _read(state, checkpoint)
        found, reasons = level(saved, now, inside=inside)
    floor = _consent() or setting or promise.declared
    if found < floor:
        raise _fall(found, floor, reasons, promise, checkpoint, run)
    if found < promise.level:
        promise = Promise(promise.declared, found, reasons)
    return Resume(found, reasons, promise)


def _read(state: Mapping[str, Any], checkpoint: str) -> tuple[Conditions, Promise]:
    try:
        kept = [state["conditions"][field.name] for field in fields(Conditions)]
        promised = state["exactness"]
        levels = promised["declared"], promised["level"]
        if not all(isinstance(part, dict) for part in kept) or {*levels} - {*get_args(Level)}:
            raise ValueError("they are of another kind")
        return Conditions(*kept), Promise(*levels, tuple(map(str, promised["reasons"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the conditions of checkpoint {checkpoint} cannot be read: {error!r}",
            "delete that folder to go on from the checkpoint before it",
        ) from error


def _consent() -> Level | None:
    """The level that this launch may fall to, if it was told one."""
    given = os.environ.get(CONSENT)
    return read_level(given, CONSENT) if given else None


def _fall(
    found: Level,
    floor: Level,
    reasons: tuple[str, ...],
    promise: Promise,
    checkpoint: str,
    run: str,
) -> RunError:
    asked = f"the run declared {described(promise.declared)}"
    if floor != promise.declared:
        asked = f"{described(floor)} is asked for"
    what = f"going on from {checkpoint} would be {described(found)}, and {asked}; what changed:"
    return RunError(
        "\n  ".join([what, *_shown(reasons)]),
        f"restore it, or go on all the same with `longspan resume {run} --exactness {found}`",
    )


def _shown(reasons: tuple[str, ...]) -> Iterator[str]:
    yield from reasons[:_MOST_REASONS]
    if len(reasons) > _MOST_REASONS:
        yield f"and {len(reasons) - _MOST_REASONS} more"
