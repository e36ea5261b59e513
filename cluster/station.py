"""Station: what the ranks of one node leave for each other, so that one of them tells of all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ..trainer.heartbeat import Beat, learned, read_beat
from .limits import Limits
from .watch import NodeReport, Order, Overdue


class Station:
    """A folder of the node: heartbeats, process ids, and the order that all ranks here follow.

    Args:
        run_dir: The run's folder.
        attempt: The number of the attempt.
        node: Ray's number of the node: there may be several on one machine.
    """

    def __init__(self, run_dir: Path, attempt: int, node: str) -> None:
        key = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        home = Path(tempfile.gettempdir()) / f"longspan-{os.getuid()}"
        self._run = home / f"{key}-{node[:16]}"
        self._attempt = attempt
        self.folder = self._run / str(attempt)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.node = node

    def beat_path(self, rank: int) -> Path:
        """Where a rank writes its heartbeat."""
        return self.folder / f"rank-{rank}.beat"

    def started(self, rank: int, pid: int) -> None:
        """A rank's process is there."""
        path = self.folder / f"rank-{rank}.pid"
        path.with_suffix(".new").write_text(str(pid))
        path.with_suffix(".new").replace(path)

    def pids(self) -> dict[int, int]:
        """The processes of the node's ranks."""
        found = {}
        for path in self.folder.glob("rank-*.pid"):
            with suppress(OSError, ValueError):
                found[int(path.stem.removeprefix("rank-"))] = int(path.read_text())
        return found

    def give(self, order: Order) -> None:
        """Hand an order to all ranks of the node."""
        path = self.folder / "order"
        path.with_suffix(".new").write_text(order)
        path.with_suffix(".new").replace(path)

    def order(self) -> Order:
        """What ranks here are to do."""
        try:
            text = (self.folder / "order").read_text()
        except OSError:
            return "go on"
        return text if text in ("stop", "dump", "end") else "go on"  # pyright: ignore

    def _not_yet(self, rank: int) -> Beat | None:
        """A rank that has not come to its first beat."""
        if self.beat_path(rank).exists():
            return None  # it is being written
        with suppress(OSError):
            age = time.time() - (self.folder / f"rank-{rank}.pid").stat().st_mtime
            return Beat("start_up", 0, 0, time.monotonic() - age, 0.0)
        return None

    def close(self) -> None:
        """Leave nothing of this attempt and of older ones on the node: a newer one may be here."""
        with suppress(OSError):
            for old in self._run.iterdir():
                if int(old.name) <= self._attempt:
                    shutil.rmtree(old, ignore_errors=True)
            self._run.rmdir()

    def look(self, limits: Limits, dumped: bool) -> NodeReport:
        """Look at all ranks of the node.

        Args:
            limits: How long they may be at one thing.
            dumped: Whether their stacks are written.
        """
        now, late, own, step = time.monotonic(), [], {}, 0
        longest: dict[str, float] = {}
        for rank, pid in self.pids().items():
            beat = read_beat(self.beat_path(rank)) or self._not_yet(rank)
            if beat is None:
                continue
            own[rank], step = beat.own_s, max(step, beat.step)
            longest |= {k: max(s, longest.get(k, 0.0)) for k, s in learned(beat).items()}
            silent, (limit, why) = now - beat.begun, limits.of(beat)
            if silent > limit:
                state = process_state(pid)
                late.append(Overdue(rank, beat.section, beat.step, silent, limit, state, why))
        return NodeReport(self.node, step, tuple(late), own, dumped, longest)


def process_state(pid: int) -> str:
    """One letter: R, S, D, T, Z; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
