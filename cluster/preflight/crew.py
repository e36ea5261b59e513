"""Crew: one inspector on every node, asked all at once and never waited for too long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ...redact import redact_text
from ..nodes import Node
from .inspector import Inspector
from .result import Result

CHECK = "answer"
_DOING_S = 1.0
# A worker without a GPU of its own would see none; this one looks at all of the node's.
_SEES_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class _Clock:
    """Tells the driver's time."""

    def now(self) -> float:
        return time.time()


class _AskTime:
    """Asks the driver's clock, from wherever it is sent to."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock

    def __call__(self) -> float:
        import ray

        return ray.get(self._clock.now.remote())


class Crew:
    """One inspector on every node.

    Args:
        nodes: Where.
        interface: The network interface that ranks will use; None: as they choose.
        deadline: When no answer is waited for any more, by the monotonic clock.
    """

    def __init__(self, nodes: Sequence[Node], interface: str | None, deadline: float) -> None:
        self.nodes, self._interface, self._deadline = nodes, interface, deadline
        self._silent: dict[str, str] = {}
        self._inspectors: dict[str, Any] = {}
        self._clock: Any = None

    def __enter__(self) -> Crew:
        import ray

        here = ray.get_runtime_context().get_node_id()
        self._clock = self._actor(_Clock, here).remote()
        self.ask_time: Callable[[], float] = _AskTime(self._clock)
        for node in self.nodes:
            # Only where it matters: a worker with variables of its own is slower to start.
            variables = {"runtime_env": {"env_vars": _SEES_GPUS}} if node.gpus else {}
            actor = self._actor(Inspector, node.id, max_concurrency=2, **variables)
            arguments = (node.name, node.address, self._interface)
            self._inspectors[node.name] = actor.remote(*arguments)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        for actor in (self._clock, *self._inspectors.values()):
            with contextlib.suppress(Exception):  # what is gone needs no end
                ray.kill(actor)

    @property
    def present(self) -> list[Node]:
        """The nodes that have answered so far."""
        return [node for node in self.nodes if node.name not in self._silent]

    def left(self, most_s: float) -> float:
        """Seconds until the deadline, at most so many."""
        return max(0.1, min(most_s, self._deadline - time.monotonic()))

    def ask(
        self, method: str, arguments: Mapping[str, Sequence[Any]], limit_s: float
    ) -> dict[str, Any]:
        """Call a method on several nodes at once.

        Args:
            method: Of the inspector.
            arguments: By the node's name.
            limit_s: Nodes that have not answered by then are silent from now on.

        Returns:
            The answers that came.
        """
        import ray

        asked = {
            getattr(self._inspectors[name], method).remote(*given): name
            for name, given in arguments.items()
        }
        if not asked:
            return {}
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
        answers = {}
        for answer in done:
            try:
                answers[asked[answer]] = ray.get(answer)
            except Exception as error:  # of Ray or of anything on the node; either way no answer
                self._silent[asked[answer]] = _why(error)
        for name, doing in self._doings([asked[answer] for answer in late]).items():
            self._silent[name] = f"nothing within {limit_s:.0f} s, {doing}"
        return {name: answers[name] for name in arguments if name in answers}

    def silent(self) -> list[Result]:
        """A failure for each node that did not answer."""
        fix = "see ray's logs there, and what keeps the node busy"
        return [
            Result(node.name, CHECK, "fail", self._silent[node.name], "an answer", fix)
            for node in self.nodes
            if node.name in self._silent
        ]

    def _doings(self, names: Sequence[str]) -> dict[str, str]:
        import ray

        asked = {name: self._inspectors[name].doing.remote() for name in names}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=_DOING_S)
        found = {}
        for name, answer in asked.items():
            try:
                found[name] = f"while {ray.get(answer, timeout=0)}"
            except Exception:  # it is silent altogether
                found[name] = "and no sign of life"
        return found

    def _actor(self, kind: type, node: str, **options: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return ray.remote(kind).options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            **options,
        )


def _why(error: Exception) -> str:
    """The last line of an error of Ray's, which holds the one that it was raised for."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return redact_text(text[:300])
