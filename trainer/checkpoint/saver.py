"""Saver: writes checkpoints behind the training's back, one at a time, on all ranks at once.

A step waits for the copy of the state to host memory. A thread of each rank then writes the rank's
file, and the threads agree with one another over a group of their own: on the folder, on whether
all have written, and on whether the committed checkpoint is what they wrote.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

import torch.distributed as dist

from ...errors import CheckpointError, LongspanError
from .cursor import Cursor
from .files import CheckpointFiles
from .folders import step_of
from .index import INDEX, build_index
from .manifest import MANIFEST, Manifest, Record, damage, marker_of, read_manifest, record
from .retention import expendable
from .settings import CheckpointSettings
from .shard import Piece, Shard, Staging, shard_name, stage
from .store import Store

_TIMEOUT = timedelta(hours=2)
_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 60.0
_CLOSE_S = 8.0  # less than a launcher waits for the other ranks
_WITNESS = 2**16
_Failure = tuple[str, str]
"""What went wrong, and what to do about it."""


@dataclass(frozen=True)
class State:
    """What this rank has to write.

    Attributes:
        pieces: Of its weights and moments.
        dtype: Of the weights as the model has them.
        steps: How often each of its parameters was updated.
    """

    pieces: list[Piece]
    dtype: str
    steps: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks.

    Attributes:
        cursor: Where the run stood.
        name: The committed folder; None where there is none.
        seconds: From the beginning of the save to its end.
        tries: Attempts that it took.
        error: Why there is no checkpoint.
        warning: What went wrong after it was committed.
    """

    cursor: Cursor
    name: str | None
    seconds: float
    tries: int
    error: CheckpointError | None = None
    warning: str = ""


@dataclass
class _Job:
    """A save at work."""

    cursor: Cursor
    info: Mapping[str, Any]
    dtype: str
    steps: Mapping[str, int]
    shard: Shard
    witness: tuple[int, bytes]
    begun: float
    outcome: Outcome | None = None
    thread: Thread | None = None


class Saver:
    """Saves the states of one run. All ranks make it, and call it alike.

    Args:
        store: The place of the checkpoints.
        settings: When and how.
        committed: The step of the newest checkpoint that is there already.
    """

    def __init__(
        self, store: Store, settings: CheckpointSettings, committed: int | None = None
    ) -> None:
        self.store, self.settings = store, settings
        self.committed = committed
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._staging = Staging()
        self._job: _Job | None = None
        self._misses = 0
        self._missed: CheckpointError | None = None

    def save(
        self, state: Callable[[], State], cursor: Cursor, info: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Begin to save. `wait` comes first where a save is in flight.

        Args:
            state: Called once, if there is anything to save.
            cursor: Where the run stands.
            info: What explains the checkpoint, printable as JSON.
            wait: Whether to return only when it has ended; `wait` then says how.
        """
        assert self._job is None
        if self.committed == cursor.step:
            return
        begun = time.monotonic()
        mine = state()
        witness = _witness(mine.pieces, cursor.step, self._rank)
        shard = stage(mine.pieces, self._staging)
        place = _place(shard, *witness[:2])
        info = json.loads(json.dumps(info))  # as it is now: the run goes on changing it
        job = _Job(cursor, info, mine.dtype, mine.steps, shard, (place, witness[2]), begun)
        self._job = job
        if wait or not self.settings.asynchronous:
            self._work(job)
        else:
            job.thread = Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
            job.thread.start()

    def poll(self) -> Outcome | None:
        """How the save in flight ended, once; None while it goes on. Never waits."""
        job = self._job
        if job is None or job.outcome is None:
            return None
        return self._ended()

    def wait(self) -> Outcome | None:
        """How the save in flight ended, when it has; None where there is none.

        Raises:
            CheckpointError: It was one failure too many.
        """
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join()
        outcome = self._ended()
        # Here and not where a save is polled: threads of ranks end at different steps.
        if self._missed is not None and self._misses >= self.settings.misses:
            raise CheckpointError(
                f"{self._misses} saves in a row have failed, the last one so: {self._missed.what}",
                f"{self._missed.fix}, then resume; older checkpoints are intact",
            )
        return outcome

    def _ended(self) -> Outcome | None:
        """Take note of how the save ended, once."""
        job, self._job = self._job, None
        if job is None:
            return None
        assert job.outcome is not None
        self._missed = job.outcome.error
        if self._missed is None:
            self.committed, self._misses = job.cursor.step, 0
        else:
            self._misses += 1
        return job.outcome

    def prune(self) -> None:
        """Remove what may go, now that the newest was read again; rank 0 only."""
        ages: dict[int, float | None] = {}
        names = {step_of(name): name for name in self.store.committed()}
        for step, name in names.items():
            ages[step] = _age(CheckpointFiles(self.store, name))
        for step in expendable(ages, self.settings, reread=True):
            self.store.remove(names[step])

    def close(self) -> None:
        """Give the save in flight some seconds: a run that failed loses less."""
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join(_CLOSE_S)

    def _work(self, job: _Job) -> None:
        """Try until a checkpoint is complete, or the tries are used up."""
        failure: _Failure | None = None
        name, warning, tries = None, "", 0
        try:
            while tries < self.settings.tries:
                tries += 1
                name, failure, warning = self._attempt(job)
                if failure is None:
                    break
                if tries < self.settings.tries:
                    time.sleep(min(_LONGEST_BACK_OFF_S, _BACK_OFF_S * 2 ** (tries - 1)))
        except Exception as error:  # a rank is gone: the group tells it in its own words
            failure = (f"the ranks could not agree on it: {type(error).__name__}: {error}", "")
        error = None if failure is None else CheckpointError(*failure)
        job.outcome = Outcome(job.cursor, name, time.monotonic() - job.begun, tries, error, warning)

    def _attempt(self, job: _Job) -> tuple[str | None, _Failure | None, str]:
        """One attempt: the committed folder, or why there is none, and a warning."""
        sizes, _ = self._everywhere(lambda: job.shard.size)
        folder, failure = self._first_rank(lambda: self._begin(job, sum(sizes)))
        if failure is not None:
            return None, failure, ""
        told, failure = self._everywhere(lambda: self._write(folder, job))
        if failure is None:
            name, failure = self._first_rank(lambda: self._commit(folder, job, told))
        else:
            name = folder
        if failure is not None:
            self._first_rank(lambda: self.store.remove(folder))
            return None, failure, ""
        _, failure = self._everywhere(lambda: self._reread(name, told[self._rank][1]))
        if failure is not None:
            self._first_rank(lambda: self.store.set_aside(name))
            return None, failure, ""
        _, problem = self._first_rank(self.prune)
        return name, None, "" if problem is None else problem[0]

    def _begin(self, job: _Job, needed: int) -> str:
        free = self.store.free()
        if free is not None and free < needed:
            raise CheckpointError(
                f"no space left for a checkpoint at {self.store}: about {needed / 2**20:,.0f} MiB "
                f"needed, {free / 2**20:,.0f} MiB free",
                "free some space there; checkpoint.keep decides how many stay",
            )
        return self.store.begin(job.cursor.step)

    def _write(self, folder: str, job: _Job) -> tuple[Any, Record, Mapping[str, int]]:
        """Write this rank's file, and compare some of it with what the model had."""
        name = shard_name(self._rank)
        self.store.write(folder, name, job.shard.parts())
        place, expected = job.witness
        if self.store.read(folder, name, place, place + len(expected)) != expected:
            raise CheckpointError(
                f"{name} does not hold the weights of step {job.cursor.step}",
                "please report this with the recipe",
            )
        return job.shard.entries, record(job.shard.parts()), job.steps

    def _commit(self, folder: str, job: _Job, told: list[Any]) -> str:
        """Index, manifest, marker: rank 0 only."""
        steps = {name: count for _, _, counts in told for name, count in counts.items()}
        files = [(shard_name(rank), entries) for rank, (entries, _, _) in enumerate(told)]
        index = build_index(job.dtype, files, steps).to_json()
        records = {shard_name(rank): found for rank, (_, found, _) in enumerate(told)}
        self.store.write(folder, INDEX, [index])
        info = {"created": time.time(), **job.info}
        manifest = Manifest(job.cursor, {**records, INDEX: record([index])}, info).to_json()
        self.store.write(folder, MANIFEST, [manifest])
        return self.store.commit(folder, job.cursor.step, marker_of(manifest))

    def _reread(self, name: str, mine: Record) -> None:
        """Whether this rank's file of the committed checkpoint is what it wrote."""
        files = CheckpointFiles(self.store, name)
        if self._rank == 0:
            read_manifest(files)
        found = damage(files, shard_name(self._rank), mine)
        if found is not None:
            raise CheckpointError(
                f"checkpoint {files} was read again, and {found}", "look at the disk"
            )

    def _first_rank(self, work: Callable[[], Any]) -> tuple[Any, _Failure | None]:
        """What rank 0 did, on all ranks: its result, or why it failed."""
        done: list[Any] = [None]
        if self._rank == 0:
            done = [_caught(work)]
        dist.broadcast_object_list(done, src=0, group=self._group)
        return done[0]

    def _everywhere(self, work: Callable[[], Any]) -> tuple[list[Any], _Failure | None]:
        """What every rank did, on all ranks: the results, and the first failure."""
        done: list[Any] = [None] * self._ranks
        dist.all_gather_object(done, _caught(work), group=self._group)
        failures = [failure for _, failure in done if failure is not None]
        return [result for result, _ in done], failures[0] if failures else None


def _caught(work: Callable[[], Any]) -> tuple[Any, _Failure | None]:
    try:
        return work(), None
    except LongspanError as error:
        return None, (error.what, error.fix)
    except Exception as error:
        return None, (f"{type(error).__name__}: {error}", "please report this")


def _age(files: CheckpointFiles) -> float | None:
    """Seconds since a checkpoint was made; None where it does not say."""
    try:
        return time.time() - float(read_manifest(files).info["created"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def _witness(pieces: list[Piece], step: int, rank: int) -> tuple[int, int, bytes]:
    """Some of the weights, taken from the model itself: piece, first element and bytes."""
    draw = random.Random(f"{step}/{rank}")
    if not pieces:
        return 0, 0, b""
    number = draw.randrange(len(pieces))
    flat = pieces[number].tensors[0].flatten()
    first = draw.randrange(max(1, flat.numel() - _WITNESS + 1))
    taken = flat[first : first + _WITNESS].to("cpu", copy=True)
    return number, first, taken.numpy().tobytes()


def _place(shard: Shard, piece: int, first: int) -> int:
    """The byte of a shard's file where an element's weight is."""
    if not shard.entries:
        return len(shard.header)
    return shard.entries[piece].offsets[0] + 4 * first
