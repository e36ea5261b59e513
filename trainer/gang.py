"""The ranks of one attempt on this machine: started together, watched, ended together."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from .failure import (
    COMPLETE,
    CRASHED,
    INTERRUPTED,
    LAUNCHER_PID,
    STOPPED,
    Failure,
    read_failures,
)
from .run_directory import RunDirectory

_POLL_S = 0.05
_GRACE_S = 10.0
_TAIL_CHARACTERS = 8000
# A rank that aborts is often the victim of another one that went away.
_SECOND_HAND = (signal.SIGABRT, signal.SIGTERM)


def say(text: str) -> None:
    """Print to stderr; a terminal that went away must not end the run before it has saved."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Gang:
    """The ranks of one attempt: started together, ended together.

    Attributes:
        directory: The run's folder.
        ranks: Processes to start.
        command: The command of one rank, without its argument.
    """

    directory: RunDirectory
    ranks: int
    command: Sequence[str]
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _signals: int = 0
    _crashed: dict[int, int] = field(default_factory=dict)
    """Exit codes of the ranks that had failed before any was told to end."""

    def run(self) -> int:
        """Start the ranks, wait for all of them and return the run's exit code."""
        with self._catch_signals():
            try:
                self._start()
                return self._watch()
            finally:
                self._kill()

    def failure(self) -> Failure | None:
        """What to show for a run that failed: the first cause, not the ranks it took along."""
        killed = {rank: -code for rank, code in self._crashed.items() if code < 0}
        first_hand = [rank for rank, number in killed.items() if number not in _SECOND_HAND]
        failures = read_failures(self.directory.path)
        if failures and not first_hand:
            return failures[0]
        for rank in [*first_hand, *killed]:
            return self._lost(rank, f"was killed by {_signal_name(killed[rank])}")
        for rank, code in self._crashed.items():
            return self._lost(rank, f"ended with exit code {code} and left no message")
        return None

    def _lost(self, rank: int, how: str) -> Failure:
        log = self._log_path(rank)
        tail = log.read_text("utf-8", "replace")[-_TAIL_CHARACTERS:] if log.exists() else ""
        return Failure(rank, "internal", f"rank {rank} {how}", tail, time.time())

    def _log_path(self, rank: int) -> Path:
        return self.directory.logs / f"rank-{rank}.log"

    def _start(self) -> None:
        port = _free_port()
        for rank in range(self.ranks):
            environment = self._environment(rank, port)
            # Rank 0 shares the terminal for its live line; the others would only garble it.
            log = None if rank == 0 else self._log_path(rank).open("ab")
            self._processes.append(self._spawn(environment, log))
            if log is not None:
                log.close()

    def _spawn(self, environment: dict[str, str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches the launcher only, which passes it on in order.
        return subprocess.Popen(
            [*self.command, str(self.directory.path)],
            env=environment,
            cwd=self.directory.working_directory(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.ranks)))
        environment.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(self.ranks),
            LOCAL_WORLD_SIZE=str(self.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        environment[LAUNCHER_PID] = str(os.getpid())
        return environment

    def _watch(self) -> int:
        told, deadline = False, math.inf
        while any(process.poll() is None for process in self._processes):
            if self._signals > 1:
                self._kill()
                return INTERRUPTED
            if deadline == math.inf and self._ended_badly():
                self._crashed = self._failed()
                deadline = time.monotonic() + _GRACE_S
                self._terminate()
            elif self._signals and not told and deadline == math.inf:
                told = True
                say("\nsaving, press Ctrl-C again to stop at once")
                self._terminate()
            if time.monotonic() > deadline:
                self._kill()
            time.sleep(_POLL_S)
        if deadline == math.inf:
            self._crashed = self._failed()
        return self._exit_code()

    def _codes(self) -> dict[int, int]:
        """The exit codes of the ranks that have ended."""
        codes = {rank: process.returncode for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _ended_badly(self) -> bool:
        return any(code not in (COMPLETE, STOPPED) for code in self._codes().values())

    def _failed(self) -> dict[int, int]:
        """The ranks that failed by themselves.

        None when a rank was stopped before it could save: the others then fail in its wake.
        """
        codes = self._codes()
        if self._signals and -signal.SIGTERM in codes.values():
            return {}
        return {rank: code for rank, code in codes.items() if code not in (COMPLETE, STOPPED)}

    def _exit_code(self) -> int:
        if all(code == COMPLETE for code in self._codes().values()):
            return COMPLETE
        if not self._crashed:
            return STOPPED
        failure = self.failure()
        return CRASHED if failure is None else failure.exit_code

    def _terminate(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        """End every rank and its helpers at once; those that have ended are left alone."""
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._count_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return name + (" (out of memory?)" if number == signal.SIGKILL else "")
