"""Gang: one attempt of a run on a cluster; Ray Train starts its ranks, watches and ends them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import RunError
from ..trainer.failure import INTERRUPTED, Failure, read_failures, without_words
from ..trainer.observe.events import EventLog
from ..trainer.run_directory import RunDirectory
from .causes import Evidence, Verdict, judge
from .limits import EVENT as LONGEST
from .nodes import Node, has_gone
from .rank import Task, listen, work
from .voice import Tail, Voice
from .watch import News

ENVIRONMENT = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""For the driver, before Ray is imported; what is set already stays."""

_POLLING = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
_POLLS_PER_S = 200
_FOLLOW_S = 0.2
_STORAGE = "ray-train"
_NEWS_S = 5.0
_LAST_WORDS_S = 10.0
"""More than the watch gives those that are left when a rank failed."""

_ENDING_S = 120.0
_STARTING_S = 900.0


@dataclass(frozen=True)
class Crew:
    """Who works on an attempt.

    Attributes:
        places: The node of every rank.
        nodes: Those nodes, by id.
        gpu: Whether every rank has a GPU.
        unit: Ranks in a row that have to be on one node.
    """

    places: Sequence[str]
    nodes: Mapping[str, Node]
    gpu: bool
    unit: int


class Gang:
    """Runs one attempt.

    Args:
        directory: The run's folder.
        task: What each rank is told.
        crew: Who works.
        voice: What the user hears.
        asked: How often the driver was asked to stop.
        joined: Called once all ranks are there.
    """

    def __init__(
        self,
        directory: RunDirectory,
        task: Task,
        crew: Crew,
        voice: Voice,
        asked: Callable[[], int],
        joined: Callable[[], None],
    ) -> None:
        import ray

        self._ray, self._directory, self._task, self._crew = ray, directory, task, crew
        self._voice, self._asked, self._stopped = voice, asked, False
        self._joined: Callable[[], None] | None = joined
        self._error: BaseException | None = None
        self._news: News | None = None
        self._next_news = 0.0
        self._tail = Tail(directory.logs / "rank-0.log", voice)
        self._log = EventLog(directory.events, task.attempt)
        self._began = time.monotonic()
        self._hung_since: float | None = None

    def run(self) -> Verdict:
        """Start the ranks, follow them to their end, and say why they ended.

        Raises:
            RunError: Ray does not start ranks, or does not end those that hang.
        """
        fit = threading.Thread(target=self._fit, name="fit", daemon=True)
        fit.start()
        while fit.is_alive():
            fit.join(_FOLLOW_S)
            self._tail.follow()
            self._hear()
            if self._is_overdue():
                break
        if fit.is_alive() and self._asked() > 1:
            return Verdict("stopped", INTERRUPTED)
        if fit.is_alive():
            what = f"ended ranks that hang within {_ENDING_S:.0f} s"
            if self._hung_since is None:
                what = f"started all ranks within {_STARTING_S:.0f} s"
            raise RunError(f"Ray has not {what}", "resume: a new driver begins afresh")
        self._hear(at_once=True)
        self._tail.follow()
        if self._news is not None and self._news.longest:
            ranks, longest = len(self._crew.places), dict(self._news.longest)
            self._log.write(LONGEST, ranks=ranks, seconds=longest)
        verdict = judge(self._evidence(), self._describe)
        self._log.close()
        shutil.rmtree(self._directory.logs / _STORAGE, ignore_errors=True)
        return verdict

    def _fit(self) -> None:
        try:
            self._trainer().fit()
        except BaseException as error:  # of another thread: told and judged here
            self._error = error

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        places = self._crew.places
        os.environ.setdefault(_POLLING, str(seconds_between_polls(len(places))))
        resources = {"CPU": 1, "GPU": 1} if self._crew.gpu else {"CPU": 1}
        return DataParallelTrainer(
            work,
            train_loop_config={"task": self._task},
            backend_config=_backend(self._task),
            scaling_config=ScalingConfig(
                num_workers=len(places),
                use_gpu=self._crew.gpu,
                resources_per_worker=resources,
                label_selector=[{"ray.io/node-id": node} for node in places],
            ),
            run_config=RunConfig(
                name=f"attempt-{self._task.attempt}",
                storage_path=str(self._directory.logs / _STORAGE),
                # Between two attempts the nodes, their number and the run's budgets are ours.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )

    def _hear(self, at_once: bool = False) -> None:
        """Ask for news once in an interval, and hand on a wish to stop."""
        now = time.monotonic()
        if self._asked() and not self._stopped:
            self._stopped = True
            self._task.watch.stop.remote()
        if now < self._next_news and not at_once:
            return
        self._next_news = now + self._task.interval
        with suppress(self._ray.exceptions.RayError):
            answer = self._task.watch.news.remote()
            news: News = self._ray.get(answer, timeout=_NEWS_S)
            self._news = news
            self._tell(news)

    def _tell(self, news: News) -> None:
        if self._joined is not None and len(news.nodes) == len(self._crew.places):
            self._joined()
            self._joined = None
        for slow in news.stragglers:
            node = self._name(slow.node)
            self._log.write("straggler", rank=slow.rank, node=slow.node, name=node,
                            own_s=slow.own_s, typical_s=slow.typical_s, step=news.step)  # fmt: skip
            self._voice.say(
                f"warning: the others wait for rank {slow.rank} on {node}: it computes "
                f"{slow.own_s:.2f} s a step, they {slow.typical_s:.2f} s"
            )
        if news.hang is not None and self._hung_since is None:
            self._hung_since, late = time.monotonic(), news.hang.overdue
            about = {} if late is None else {"rank": late.rank, "section": late.section}
            silent = 0.0 if late is None else late.silent_s
            self._log.write("hang", node=news.hang.node, silent_s=silent, step=news.step, **about)
            self._voice.say(f"hang: {news.hang.words}; stacks are in {self._directory}/logs")

    def _name(self, node: str) -> str:
        known = self._crew.nodes.get(node)
        return known.name if known else node[:8]

    def _is_overdue(self) -> bool:
        """Whether there is nothing more to wait for: a second request to stop, or Ray hangs too."""
        now, there = time.monotonic(), 0 if self._news is None else len(self._news.nodes)
        hung = self._hung_since is not None and now > self._hung_since + _ENDING_S
        late = there < len(self._crew.places) and now > self._began + _STARTING_S
        return hung or late or self._asked() > 1

    def _describe(self, rank: int, code: int) -> Failure:
        return without_words(rank, code, self._directory.logs / f"rank-{rank}.log")

    def _evidence(self) -> Evidence:
        news, error = self._news, self._error
        died = _dead_workers(error)
        drained = getattr(getattr(error, "preemption_info", None), "preempted_node_to_ranks", {})
        complete = self._directory.is_complete()
        failed = not complete and (error is not None)
        lost = [id for id, node in self._crew.nodes.items() if failed and has_gone(node)]
        return Evidence(
            ranks=len(self._crew.places),
            nodes=news.nodes if news else {},
            ends=news.ends if news else {},
            failures=read_failures(self._directory.path),
            lost=lost,
            hang=news.hang if news else None,
            preempted=list(drained),
            died=died,
            error="" if error is None else f"{type(error).__name__}: {error}",
            asked=self._stopped,
            complete=complete,
        )


def seconds_between_polls(ranks: int) -> int:
    """How often Ray Train asks each worker whether it is alive: in all so many times a second."""
    return max(1, -(-ranks // _POLLS_PER_S))


def _dead_workers(error: BaseException | None) -> dict[int, str]:
    """Ranks whose Ray worker is gone; those whose function raised are alive."""
    found = {}
    for rank, failure in getattr(error, "worker_failures", {}).items():
        if "HealthCheck" in type(failure).__name__:
            found[int(rank)] = str(getattr(failure, "failure", failure))
    return found


def _backend(task: Task) -> Any:
    """What Ray Train sets up in its workers: nothing but their ears and their view of GPUs.

    Before it ends them, ranks that are left when another one failed show where they are.
    """
    from ray.train.backend import Backend, BackendConfig

    class _Ears(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(listen)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            with suppress(Exception):  # without stacks, then
                told = task.watch.last_words.remote(task.attempt)
                ray.get(told, timeout=_LAST_WORDS_S)

    class _Config(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return _Ears

    return _Config()
