"""Rank: the function that Ray Train runs for each rank; it starts the rank's process and minds it.

The training itself knows nothing of Ray: it is the process that `longspan train` starts, too.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import RunError
from ..trainer.devices import gpu_count, usable_cores
from ..trainer.exactness import CONSENT
from ..trainer.failure import (
    COMPLETE,
    INTERRUPTED,
    LAUNCHER_PID,
    STOPPED,
    USER_ERROR,
    record_failure,
)
from ..trainer.heartbeat import HEARTBEAT
from ..trainer.loopback import keep_to_loopback
from ..trainer.observe.attempts import ATTEMPT
from ..trainer.redacted_log import RedactedLog
from ..trainer.run_directory import RunDirectory
from ..trainer.stopping import SAVE_SIGNAL
from .interfaces import Interface, find_interface, variables
from .limits import Limits
from .node_secrets import short_secrets, take_secrets
from .preflight.network import free_port
from .stacks import dump, flight_recorder
from .station import Station, process_state
from .watch import Assignment, End, NodeReport, Order, Place

_WORKER = (sys.executable, "-P", "-m", "longspan.trainer.worker")
RANKS_LOCK = "ranks.lock"
"""Held, shared, by every rank's process: whoever starts another gang waits until it is free."""

_HERE = "127.0.0.1"
_POLL_S = 0.1
_ASK_S = 20.0
_JOIN_S = 300.0
_SHOW_S = 15.0
_SHOW_OTHERS_S = 4.0
_notice = threading.Event()


class RankEnded(Exception):
    """A rank's process ended before its time; the failure itself is in the run's logs."""


@dataclass(frozen=True)
class Task:
    """What each rank of an attempt is told.

    Attributes:
        run_dir: The run's folder, on storage that all nodes share.
        attempt: The number of the attempt.
        watch: The actor that knows all ranks.
        interval: Seconds between two reports of a node.
        limits: How long ranks may be at one thing before that is a hang.
        grace: Seconds to save in when ranks are asked to stop.
        secrets: Files on the nodes, by the name of the variable that gets their content.
        interface: Of the network between the nodes, as NCCL takes it; None: any.
        exactness: The level that this launch may fall to, for the environment; None: as the run
            says.
    """

    run_dir: str
    attempt: int
    watch: Any
    interval: float
    limits: Limits
    grace: float
    secrets: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    exactness: str | None = None


def work(config: dict[str, Any]) -> int:
    """Run one rank to its end; what `DataParallelTrainer` is given.

    Args:
        config: Has the `Task` under `task`.

    Returns:
        0 complete, 75 saved and stopped.

    Raises:
        RankEnded: The process ended otherwise.
    """
    import ray.train

    task: Task = config["task"]
    context = ray.train.get_context()
    return Rank(task, context.get_world_rank(), context.get_world_size()).run()


def listen() -> None:
    """Take a SIGTERM of this process for a notice; call in the main thread of a Ray worker."""
    signal.signal(signal.SIGTERM, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    _notice.set()


class Rank:
    """One rank of a gang, seen from the Ray worker that starts its process.

    Args:
        task: What all ranks are told.
        rank: Its number.
        ranks: Of the gang.
    """

    def __init__(self, task: Task, rank: int, ranks: int) -> None:
        import ray

        self._ray, self._task, self._rank, self._ranks = ray, task, rank, ranks
        self._directory = RunDirectory(Path(task.run_dir))
        self._node = ray.get_runtime_context().get_node_id()
        self._station: Station
        self._interface: Interface
        self._first = False
        """Whether it is the one that tells of its node."""
        self._report: Any = None
        self._next_report = 0.0
        self._dumped = False
        self._told_at = math.inf
        self._noticed = False
        self._log: RedactedLog | None = None
        self._leaving: tuple[str, ...] = ()
        """Nodes of the gang that Ray is about to lose."""

    def run(self) -> int:
        """See `work`."""
        try:
            code = self._work()
            with suppress(Exception):
                end = End(code, self._noticed, self._leaving)
                sent = self._task.watch.ended.remote(self._task.attempt, self._rank, end)
                self._ray.get(sent, timeout=_ASK_S)
            began = self._log is not None
            if began and code not in (COMPLETE, STOPPED, USER_ERROR, INTERRUPTED):
                self._show_others()
        finally:
            if self._first:
                self._station.close()
        if code in (COMPLETE, STOPPED):
            return code
        raise RankEnded(f"rank {self._rank} ended with exit code {code}")

    def _work(self) -> int:
        """From joining to the end of the process; its exit code."""
        try:
            self._station = Station(self._directory.path, self._task.attempt, self._node)
            given = self._join()
            if given.order in ("stop", "end"):
                return STOPPED
            if given.problem:
                raise RunError(
                    f"a gang of {self._ranks} ranks cannot work: {given.problem}",
                    "resume on nodes with as many GPUs each; a new run can be submitted with "
                    "smaller stages.*.parallel",
                )
            self._first = given.local_rank == 0
            return self._mind(self._start(given))
        except Exception as error:
            return record_failure(self._directory.path, self._rank, error)

    def _show_others(self) -> None:
        """Write where the other ranks of this node are, before the gang is ended for this one."""
        others = {rank: pid for rank, pid in self._station.pids().items() if rank != self._rank}
        self._dump(others, _SHOW_OTHERS_S)

    def _dump(self, pids: Mapping[int, int], limit_s: float) -> None:
        # Of one that has ended there are no stacks, and its number may be another's by now.
        alive = {rank: pid for rank, pid in pids.items() if process_state(pid) not in ("", "Z")}
        dump(alive, self._directory.logs, self._station.folder, self._task.attempt, limit_s)

    def _join(self) -> Assignment:
        """Wait for all ranks."""
        own = self._ray.util.get_node_ip_address()
        try:
            self._interface = find_interface(self._task.interface, own)
            address = self._interface.address
            # Where all ranks are on one machine they meet on loopback.
            port = free_port(address, _HERE)
        except OSError as error:
            raise RunError(
                f"{error} on {socket.gethostname()}",
                "name one that every node has: `interface` of the cluster",
            ) from error
        place = Place(self._rank, self._node, socket.gethostname(), address, port)
        answer = self._task.watch.join.remote(self._task.attempt, place)
        return self._ray.get(answer, timeout=_JOIN_S)

    def _start(self, given: Assignment) -> subprocess.Popen[bytes]:
        path = self._directory.logs / f"rank-{self._rank}.log"
        environment = self._environment(given)
        self._log = RedactedLog(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))
        if warning := short_secrets(self._task.secrets):
            os.write(self._log.fileno(), f"{warning}\n".encode())
        with _shared_lock(self._directory.path / RANKS_LOCK) as held, _only_save_blocked():
            child = subprocess.Popen(
                [*_WORKER, str(self._directory.path)],
                env=environment,
                cwd=self._directory.working_directory(self._directory.path),
                stdin=subprocess.DEVNULL,
                stdout=self._log.fileno(),
                stderr=self._log.fileno(),
                start_new_session=True,
                pass_fds=[held],
            )
        self._log.start()
        self._station.started(self._rank, child.pid)
        return child

    def _environment(self, given: Assignment) -> dict[str, str]:
        task, logs = self._task, self._directory.logs
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        # Ray sets it to the CPUs that it gave away, which is not what the ranks may use.
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // given.host_ranks))
        environment.update(
            RANK=str(self._rank),
            LOCAL_RANK=str(given.local_rank),
            WORLD_SIZE=str(self._ranks),
            LOCAL_WORLD_SIZE=str(given.local_ranks),
            MASTER_ADDR=given.address,
            MASTER_PORT=str(given.port),
        )
        environment[LAUNCHER_PID] = str(os.getpid())
        environment[ATTEMPT] = str(task.attempt)
        environment[HEARTBEAT] = str(self._station.beat_path(self._rank))
        if gpu_count():
            environment |= flight_recorder(logs, self._station.folder, task.attempt)
        if task.interface is None and given.address == _HERE:
            keep_to_loopback(environment)
        else:
            environment |= variables(task.interface, self._interface)
        if task.exactness is not None:
            environment[CONSENT] = task.exactness
        # What the rank prints goes through here, and cannot be redacted without knowing them.
        known = take_secrets(task.secrets)
        return environment | known

    def _mind(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for the end of the process; meanwhile tell and follow orders."""
        try:
            while (code := child.poll()) is None:
                order = self._station.order()
                if self._first:
                    order = self._tell()
                self._noticed = self._is_noticed() or self._noticed
                if order == "end":
                    return self._end(child)
                if (order == "stop" or self._noticed) and self._told_at == math.inf:
                    self._told_at = time.monotonic()
                    child.send_signal(signal.SIGTERM)
                alone = not self._first and not self._station.folder.exists()
                if alone and self._told_at == math.inf:
                    self._told_at = time.monotonic()  # who told of this node has ended
                if time.monotonic() > self._told_at + self._task.grace:
                    self._end(child)
                    return INTERRUPTED
                time.sleep(_POLL_S)
        finally:
            self._end(child)
            if self._log is not None:
                self._log.close()
        return code

    def _is_noticed(self) -> bool:
        """Whether this process or a node of the gang is about to be taken away."""
        self._leaving = _leaving_nodes()
        return _notice.is_set() or bool(self._leaving)

    def _end(self, child: subprocess.Popen[bytes]) -> int:
        """End the process and its helpers at once."""
        if child.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        return child.wait()

    def _tell(self) -> Order:
        """Tell of the whole node once in an interval, and hand on what is heard; never waits."""
        order = self._heard()
        now = time.monotonic()
        if self._report is None and now >= self._next_report:
            self._next_report = now + self._task.interval
            looked = self._look()
            self._report = self._task.watch.report.remote(self._task.attempt, looked)
        return order

    def _look(self) -> NodeReport:
        return self._station.look(self._task.limits, self._dumped)

    def _heard(self) -> Order:
        known = self._station.order()
        if self._report is None or not self._ray.wait([self._report], timeout=0)[0]:
            return known
        report, self._report = self._report, None
        try:
            order: Order = self._ray.get(report, timeout=_ASK_S)
        except Exception:  # without the one who watches, ranks train on
            return known
        if order == "dump" and not self._dumped:
            self._dump(self._station.pids(), _SHOW_S)
            self._dumped, self._next_report = True, 0.0
        if order != known:
            self._station.give(order)
        return order


def _leaving_nodes() -> tuple[str, ...]:
    """Nodes of the gang that are taken away, as Ray Train's watcher has told this worker.

    `ray.train.get_preemption_info` would be a barrier of all ranks.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    told = getattr(get_train_context(), "preemption_context", None)
    info = getattr(told, "preemption_info", None)
    return () if info is None else tuple(info.preempted_node_ids)


@contextmanager
def _shared_lock(file: Path) -> Iterator[int]:
    """The lock of all ranks, for a process that inherits it; where there are no locks, a file."""
    with file.open("ab") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield lock.fileno()


@contextmanager
def _only_save_blocked() -> Iterator[None]:
    """Start a process as `longspan train` does: what asks it to save waits until it listens."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, {SAVE_SIGNAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
