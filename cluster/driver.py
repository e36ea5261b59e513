"""Driver: the Ray job that leads a run on a cluster to its end (`-m longspan.cluster.driver`).

It owns the run's folder, decides who works, and begins again where that can help. Ray Train does
the rest: it places, starts, watches and ends the ranks of an attempt.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import CheckpointError, LongspanError, RunError
from ..trainer.checkpoint.choice import newest_step, refuse_complete, set_aside_newer
from ..trainer.checkpoint.store import Store, open_store
from ..trainer.exactness import Level, described
from ..trainer.failure import (
    COMPLETE,
    CRASHED,
    INTERRUPTED,
    STOPPED,
    USER_ERROR,
    clear_failures,
    shown,
)
from ..trainer.observe.attempts import ended, launched, queued
from ..trainer.observe.events import EventLog, newest_attempt
from ..trainer.observe.summary import render_complete
from ..trainer.observe.wandb_account import check_key, has_own_key
from ..trainer.run_directory import RunDirectory, create_or_open
from ..trainer.settings import RunSettings
from .budgets import Budgets, Cause
from .causes import Verdict, broken_off
from .connection import connect
from .crews import Crews
from .gang import ENVIRONMENT, Crew, Gang
from .limits import known_limits
from .node_secrets import take_secrets
from .nodes import Device, Node
from .placement import group_of, split_groups
from .preflight.preflight import preflight
from .preflight.report import healthy
from .rank import RANKS_LOCK, Task
from .recovery import recovery_line
from .voice import Voice
from .watch import Watch

_RANKS_END_S = 120.0
"""Ranks that lost the head of their cluster end after its reconnect time-out, 60 s by default."""

_POLL_S = 0.1
_ANSWER_S = 120.0


@dataclass(frozen=True)
class Options:
    """What the driver is asked for.

    Attributes:
        run_id: Of the run, for the user.
        run_dir: Its folder, on storage that all nodes share.
        name: The recipe's name.
        exactness: The level that this launch may fall to; None: as the run says.
        from_step: Of the checkpoint to go on from; None: the newest.
        secrets: Files on the nodes, by the name of the variable that gets their content.
        interface: Of the network between the nodes.
        device: What every rank is to have, as it was decided at submission; None: GPUs if any are
            up, else cores.
        ranks: Of the run as they were counted at submission, where its recipe says none.
        slots: Ranks that the largest node takes that there can be; 0: as those that are up.
        interval: Seconds between two reports of a node.
        preflight: Whether nodes are looked at before they are used.
    """

    run_id: str
    run_dir: Path
    name: str
    exactness: Level | None = None
    from_step: int | None = None
    secrets: tuple[tuple[str, str], ...] = ()
    interface: str | None = None
    device: Device | None = None
    ranks: int | None = None
    slots: int = 0
    interval: float = 2.0
    preflight: bool = True


class Driver:
    """Leads a run to its end; Ray is connected.

    Args:
        run: The resolved settings; already checked.
        options: What is asked for.
        voice: What the user hears.
    """

    def __init__(self, run: RunSettings, options: Options, voice: Voice) -> None:
        self._run, self._options, self._voice = run, options, voice
        self._signals = 0
        self._budgets = Budgets(run.recovery)
        self._versions: Mapping[str, str] | None = None
        """Of the first look that found a fit node: those that come later must have the same."""

    def lead(self) -> int:
        """Train, or go on, until the run ends.

        Returns:
            0 complete, 75 stopped and resumable, 2 user error, 1 crash, 130 stopped at once.

        Raises:
            LongspanError: Nothing could be started.
        """
        options, run = self._options, self._run
        if has_own_key():  # else rank 0 looks: nodes may have a key or packages that a head lacks
            check_key(run.tracking)
        directory = create_or_open(options.run_dir, run, options.name)
        if (summary := directory.read_summary()) is not None:
            refuse_complete(directory, options.from_step)
            self._voice.say(render_complete(str(directory), summary))
            return COMPLETE
        with directory.lock():
            self._voice.hush(directory.logs)
            _wait_for_ranks(directory)
            store = open_store(run.checkpoint.where, directory.path)
            store.claim()
            if options.from_step is not None:
                set_aside_newer(directory, run, store, options.from_step)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, self._count_signal)
            verdict = self._attempts(directory, store)
            self._report(directory, store, verdict)
        return verdict.code

    def _attempts(self, directory: RunDirectory, store: Store) -> Verdict:
        """One gang after the other until no other can help."""
        look = partial(self._look_at, directory) if self._options.preflight else None
        crews = Crews(
            self._run, directory, self._voice, self._options.exactness, look,
            device=self._options.device, planned=self._options.ranks, slots=self._options.slots,
        )  # fmt: skip
        watch = None
        try:
            while True:
                attempt = queued(directory.events)
                try:
                    crew = crews.next(lambda: self._signals > 0)
                    if crew is None:
                        ended(directory.events, attempt, STOPPED)
                        return Verdict("stopped", STOPPED)
                    watch = self._begin(watch, attempt, crew)
                    wanted = self._run.ranks or crews.planned
                    self._announce(directory, store, attempt, crew, wanted)
                    verdict = self._attempt(directory, attempt, crew, watch, crews.settle)
                except Exception as error:
                    broken = broken_off(error)
                    ended(directory.events, attempt, broken.code, broken.failure)
                    raise
                ended(directory.events, attempt, verdict.code, verdict.failure)
                if (cause := verdict.cause) not in ("infrastructure", "preemption"):
                    return verdict
                crews.learn(verdict)
                if self._signals:
                    return Verdict("stopped", STOPPED, verdict.failure)
                if not self._goes_on(cause, verdict):
                    return verdict
                _wait_for_ranks(directory)
        finally:
            crews.settle()

    def _goes_on(self, cause: Cause, verdict: Verdict) -> bool:
        """Whether a new start is left for what ended a gang; either way it is told."""
        if not self._budgets.spend(cause):
            self._voice.complain(f"no new start is left (recovery.retries.{cause})")
            return False
        words = "" if verdict.failure is None else verdict.failure.message
        self._voice.say(f"{words}: {self._budgets.words(cause)}")
        return True

    def _attempt(
        self,
        directory: RunDirectory,
        attempt: int,
        crew: Crew,
        watch: Any,
        joined: Callable[[], None],
    ) -> Verdict:
        """One gang, from its start to its end."""
        clear_failures(directory.path)
        ranks, device = len(crew.places), "gpu" if crew.gpu else "cpu"
        launched(directory.events, attempt, ranks=ranks, nodes=[*crew.nodes], device=device)
        task = self._task(directory, attempt, watch, len(crew.places))
        return Gang(directory, task, crew, self._voice, lambda: self._signals, joined).run()

    def _look_at(
        self, directory: RunDirectory, nodes: Sequence[Node], beside: Sequence[Node]
    ) -> dict[str, str]:
        """What is wrong with nodes, by id; they meet those beside them."""
        self._voice.say(f"looking at {len(nodes)} node{'s' * (len(nodes) > 1)}")
        log = EventLog(directory.events, newest_attempt(directory.events))
        report = preflight(
            nodes, self._run, directory.path,
            beside=beside, interface=self._options.interface, log=log, like=self._versions,
        )  # fmt: skip
        self._versions = self._versions or (report.versions if healthy(report) else None)
        log.close()
        for problem in report.problems:
            self._voice.say(f"{problem.level}: {problem.node}: {problem}")
        return {n.id: str(found[0]) for n in nodes if (found := report.failures(n))}

    def _announce(
        self, directory: RunDirectory, store: Store, attempt: int, crew: Crew, wanted: int | None
    ) -> None:
        ranks, nodes, step = len(crew.places), len(crew.nodes), newest_step(store)
        if wanted is not None and ranks < wanted:
            # What no checkpoint was written of has lost nothing.
            exactness = f": exactness {described('E1')}" if step is not None else ""
            self._voice.say(f"{ranks} of {wanted} ranks have to do{exactness}")
        if split := split_groups(self._run, crew.unit):
            self._voice.say(f"warning: {split}")
        where = f"from the checkpoint at step {step}" if step is not None else "from the beginning"
        self._voice.say(
            f"{directory}: attempt {attempt} with {ranks} rank{'s' * (ranks > 1)} on "
            f"{nodes} node{'s' * (nodes > 1)}, {where}"
        )

    def _task(self, directory: RunDirectory, attempt: int, watch: Any, ranks: int) -> Task:
        options, recovery = self._options, self._run.recovery
        return Task(
            run_dir=str(directory.path),
            attempt=attempt,
            watch=watch,
            interval=options.interval,
            limits=known_limits(recovery.hang, directory.events, ranks),
            grace=recovery.grace,
            secrets=dict(options.secrets),
            interface=options.interface,
            exactness=options.exactness,
        )

    def _begin(self, watch: Any, attempt: int, crew: Crew) -> Any:
        """The actor that knows all ranks, told of a new attempt; another one if it is gone."""
        import ray
        from ray.exceptions import RayError

        for known in (watch, None):
            try:
                actor = known or self._new_watch()
                group = group_of(self._run, crew.unit)
                begin = actor.begin.remote(attempt, len(crew.places), crew.unit, group)
                ray.get(begin, timeout=_ANSWER_S)
                return actor
            except RayError as error:
                reason = str(error).strip().partition("\n")[0]
        raise RunError(
            f"the driver's node starts no actor: {reason}",
            "look at its memory and at the logs of Ray there, then resume",
        )

    def _new_watch(self) -> Any:
        """On the driver's own node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        actor = ray.remote(Watch).options(
            num_cpus=0, max_concurrency=100_000, scheduling_strategy=strategy
        )
        return actor.remote(self._options.interval)

    def _report(self, directory: RunDirectory, store: Store, verdict: Verdict) -> None:
        """Say why the run ended here, once, and how to go on."""
        complain, failure = self._voice.complain, verdict.failure
        if (line := recovery_line(directory.events)) is not None:
            self._voice.say(line)
        if verdict.code == COMPLETE:
            return
        if verdict.code in (CRASHED, USER_ERROR) and failure is not None:
            complain(shown(failure))
            complain(f"  logs: {directory}/logs")
        try:
            step = newest_step(store)
        except CheckpointError:  # why the ranks ended decides the exit code, not this
            step = None
        saved = "no checkpoint was written" if step is None else f"saved at step {step}"
        complain(f"{saved}; go on with:\n  longspan resume {self._options.run_id}")

    def _count_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


def _wait_for_ranks(directory: RunDirectory) -> None:
    """Wait until no rank of an earlier gang writes into the run any more.

    Raises:
        RunError: One does not end.
    """
    deadline = time.monotonic() + _RANKS_END_S
    with (directory.path / RANKS_LOCK).open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError:  # a file system without locks
                return
            if time.monotonic() > deadline:
                raise RunError(
                    f"ranks of an earlier attempt still work in {directory}",
                    "end `longspan.trainer.worker` on the nodes that were lost, then resume",
                )
            time.sleep(_POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a Ray job; see `Options`.

    Returns:
        The exit code; mistakes of the user are printed, not raised.
    """
    options, recipe = _parse(arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    voice = Voice()
    # The key of a tracker, those of a store: what the driver itself needs, and must not show.
    take_secrets(dict(options.secrets), all_here=False)
    try:
        run = _read(recipe)
        connect()
        return Driver(run, options, voice).lead()
    except LongspanError as error:
        voice.complain(f"error: {error}")
        absent = [pair for pair in options.secrets if pair[0] not in os.environ]
        for name, path in absent if isinstance(error, CheckpointError) else ():
            voice.complain(f"  the secret {name} is not in {path} on {socket.gethostname()}")
        return error.exit_code
    except Exception:  # stderr leads to a file by now
        voice.complain(traceback.format_exc())
        return CRASHED
    finally:
        voice.close()


def _read(recipe: Path) -> RunSettings:
    """The settings that came with the job.

    Raises:
        RunError: They are none.
    """
    try:
        return RunSettings.model_validate(yaml.safe_load(recipe.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise RunError(
            f"{recipe} holds no resolved recipe: {error}", "submit the run again"
        ) from error


def _parse(arguments: Sequence[str] | None) -> tuple[Options, Path]:
    parser = argparse.ArgumentParser(prog="longspan.cluster.driver", allow_abbrev=False)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--recipe", required=True, type=Path)
    parser.add_argument("--exactness", choices=("E0", "E1", "E2"))
    parser.add_argument("--from", dest="from_step", type=int)
    parser.add_argument("--secrets", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--interface")
    parser.add_argument("--no-preflight", dest="preflight", action="store_false")
    parser.add_argument("--device", choices=("gpu", "cpu"))
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--slots", type=int, default=Options.slots)
    parser.add_argument("--interval", type=float, default=Options.interval)
    given = vars(parser.parse_args(arguments))
    recipe = given.pop("recipe")
    secrets = [tuple(pair.partition("=")[::2]) for pair in given.pop("secrets")]
    return Options(**given, secrets=tuple(secrets)), recipe


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Ray's threads may wait for what is gone; everything of ours is written.
    os._exit(code if code in (COMPLETE, USER_ERROR, STOPPED, INTERRUPTED) else CRASHED)
