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

from .devices import usable_cores
from .failure import (
    COMPLETE,
    CRASHED,
    INTERRUPTED,
    LAUNCHER_PID,
    STOPPED,
    Failure,
    first_cause,
    read_failures,
    without_words,
)
from .loopback import keep_to_loopback
from .observe.attempts import ATTEMPT
from .redacted_log import RedactedLog
from .run_directory import RunDirectory
from .stopping import SAVE_SIGNAL

_POLL_S = 0.05
_GRACE_S = 10.0
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def say(text: str) -> None:
    """Print to stderr; a terminal that went away must not end the run before it has saved."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


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
        attempt: The number of this launch of the run.
        grace: Seconds that the ranks have to save once they are asked to stop.
        held: Open files that the ranks inherit: the lock of the run, which none of them may leave
            to another launch while it can still write.
    """

    directory: RunDirectory
    ranks: int
    command: Sequence[str]
    attempt: int = 1
    grace: float = math.inf
    held: Sequence[int] = ()
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _logs: list[RedactedLog] = field(default_factory=list)
    _signals: int = 0
    _save_asked: bool = False
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
                self._close_logs()

    def failure(self) -> Failure | None:
        """What to show for a run that failed."""
        failures = read_failures(self.directory.path)
        return first_cause(failures, self._crashed, self._lost)

    def _lost(self, rank: int, code: int) -> Failure:
        return without_words(rank, code, self._log_path(rank))

    def _log_path(self, rank: int) -> Path:
        return self.directory.logs / f"rank-{rank}.log"

    def _start(self) -> None:
        port = _free_port()
        for rank in range(self.ranks):
            environment = self._environment(rank, port)
            self._processes.append(self._spawn(environment, *self._outputs(rank)))
        for log in self._logs:
            log.start()

    def _outputs(self, rank: int) -> tuple[int | None, int | None]:
        """Where a rank's stdout and stderr go: pipes into files or streams that are no terminal.

        Rank 0 shares the terminal for its live line; the others would only garble it.
        """
        if rank == 0:
            shared = _same_file(1, 2)
            out = self._log(1)
            return out, out if shared else self._log(2)
        log = RedactedLog(os.open(self._log_path(rank), _APPEND, 0o644))
        self._logs.append(log)
        return log.fileno(), log.fileno()

    def _log(self, stream: int) -> int | None:
        """A pipe into a stream of this process; None, which shares it, for a terminal."""
        if os.isatty(stream):
            return None
        self._logs.append(RedactedLog(stream, owned=False))
        return self._logs[-1].fileno()

    def _spawn(
        self, environment: dict[str, str], out: int | None, err: int | None
    ) -> subprocess.Popen[bytes]:
        # Until a rank listens, what asks it to save has to wait instead of ending it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE_SIGNAL})
        try:
            # A session of its own: Ctrl-C reaches the launcher only, which passes it on in order.
            return subprocess.Popen(
                [*self.command, str(self.directory.path)],
                env=environment,
                cwd=self.directory.working_directory(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                pass_fds=self.held,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

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
        keep_to_loopback(environment)
        environment[LAUNCHER_PID] = str(os.getpid())
        environment[ATTEMPT] = str(self.attempt)
        return environment

    def _watch(self) -> int:
        told, deadline, saved_by = False, math.inf, math.inf
        while self._any_alive():
            late = time.monotonic() > saved_by and deadline == math.inf
            if late:
                say(f"not saved within {self.grace:g} s (recovery.grace): stopped at once")
            if late or self._signals > 1:
                self._kill()
                return INTERRUPTED
            if self._save_asked:
                self._pass_save_on()
            if deadline == math.inf and self._ended_badly():
                self._crashed = self._failed()
                deadline = time.monotonic() + _GRACE_S
                self._terminate()
            elif self._signals and not told and deadline == math.inf:
                told, saved_by = True, time.monotonic() + self.grace
                say("\nsaving, press Ctrl-C again to stop at once")
                self._terminate()
            if time.monotonic() > deadline:
                self._kill()
            time.sleep(_POLL_S)
        if deadline == math.inf:
            self._crashed = self._failed()
        self._close_logs()
        return self._exit_code()

    def _close_logs(self) -> None:
        while self._logs:
            self._logs.pop().close()

    def _any_alive(self) -> bool:
        # All of them are asked: `any` over a generator would stop at the first that lives.
        return None in [process.poll() for process in self._processes]

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

    def _pass_save_on(self) -> None:
        """Ask one rank to save: all of them learn of it in the same step."""
        self._save_asked = False
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(SAVE_SIGNAL)
                return

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
        before[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, self._ask_to_save)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self._save_asked = True


def _same_file(first: int, second: int) -> bool:
    """Whether two streams of this process go to one place, as after `2>&1`."""
    try:
        return os.path.sameopenfile(first, second)
    except OSError:
        return False
