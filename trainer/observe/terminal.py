"""The run on a terminal: a live line where there is one, plain `key=value` lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...redact import redact_text
from .sink import Sink, StepMetrics, numbers
from .summary import render_summary

_PLAIN_EVERY_S = 10.0
_LIVE_EVERY_S = 0.1
_BAR = 16
# What a narrow terminal does without.
_DROPPED_FIRST = ("bar", "lr", "stage", "norm")
_SMOOTHING = 0.1


class Terminal(Sink):
    """Shows a run to the person who watches it. Errors of the stream are ignored.

    Args:
        directory: The run directory as the user would type it.
        stream: Where to write; stdout when left out.
        live: A line that is redrawn in place; left out: when the stream is a terminal.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        directory: str = "",
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stdout
        self._directory, self._clock = directory, clock
        self._console = Console(
            file=stream, force_terminal=live, highlight=False, soft_wrap=True, markup=False
        )
        self._is_live = self._console.is_terminal if live is None else live
        self._unicode = (getattr(stream, "encoding", None) or "ascii").lower().startswith("utf")
        self._live: Live | None = None
        self._eta = Eta()
        self._stages: list[str] = []
        self._shown_at = -float("inf")
        self._stall_s = 0.0

    def run_started(self, info: Mapping[str, Any]) -> None:
        """Remember the stages ahead; one line with what a resume will keep."""
        stages = info.get("stages", ())
        self._stages = [stage["name"] for stage in stages]
        self._eta = Eta({stage["name"]: (stage["steps"], stage["tokens"]) for stage in stages})
        if exactness := info.get("exactness"):
            reason = f": {exactness['reason']}" if exactness["reason"] else ""
            self.message(f"exactness {exactness['meaning']}{reason}")

    def stage_started(self, name: str, index: int, info: Mapping[str, Any]) -> None:
        """One line with what the stage runs."""
        if name not in self._stages:
            self._stages.append(name)
        self._eta.restart()
        details = " ".join(f"{key}={value}" for key, value in info.items() if _is_short(value))
        self.message(f"stage {index + 1}/{len(self._stages)} {name}" + (details and f": {details}"))

    def step(self, metrics: StepMetrics) -> None:
        """Redraw the live line, or print one every ten seconds and at a stage's two ends."""
        self._eta.update(metrics)
        edge = metrics.stage_step in (1, metrics.stage_steps)
        every = _LIVE_EVERY_S if self._is_live else _PLAIN_EVERY_S
        if not edge and self._clock() - self._shown_at < every:
            return
        self._shown_at = self._clock()
        left = self._eta.seconds(metrics)
        with suppress(OSError, ValueError):
            if self._is_live:
                self._draw(self._live_line(metrics, left))
            else:
                self._console.print(plain_line(metrics, left))

    def compared(self, step: int, values: Mapping[str, Any]) -> None:
        """One line with both losses."""
        self.message(
            "canary: over context ranks loss {loss:.6g}, alone {loss_alone:.6g}; gradients differ "
            "by {grad_difference:.1e} ({tokens} tokens, {seconds:.1f} s)".format_map(values)
        )

    def alarm(self, name: str, step: int, text: str) -> None:
        """One line above the live one."""
        self.message(f"ALARM at step {step}: {text}")

    def skipped(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        """One line above the live one."""
        self.warning(f"step {step} skipped: {reason} (loss {loss:.4g}, grad norm {grad_norm:.4g})")

    def rewound(self, step: int, to: int, sequences: int, reason: str) -> None:
        """One line above the live one."""
        where = f"step {to}" if to else "the start"
        self.warning(f"step {step}: {reason}; back to {where}, without {sequences} sequences")

    def evaluated(self, name: str, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """One line with the numbers."""
        shown = " ".join(f"{key}={value:.6g}" for key, value in numbers(values).items())
        self.message(f"evaluated {name} at step {step}: {shown}")

    def saving(self, step: int, stall_s: float) -> None:
        """Kept for the line that says that it is saved."""
        self._stall_s = stall_s

    def saved(self, step: int, path: Path, seconds: float) -> None:
        """One line."""
        waited = f"training waited {self._stall_s:.1f} s"
        self.message(f"saved step {step} in {seconds:.1f} s, {waited}")

    def message(self, text: str) -> None:
        """One line above the live one."""
        with suppress(OSError, ValueError):
            self._console.print(redact_text(text))

    def warning(self, text: str) -> None:
        """One line above the live one."""
        self.message(f"warning: {text}")

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The summary in place of the live line."""
        self._end_live()
        self.message(render_summary(self._directory, summary))

    def stopped(self, step: int, reason: str) -> None:
        """One line in place of the live one."""
        self._end_live()
        self.message(f"stopped after step {step}: {reason}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._end_live()

    def _draw(self, line: Text) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(line, refresh=True)

    def _end_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError, ValueError):
                live.stop()

    def _live_line(self, metrics: StepMetrics, left_s: float) -> Text:
        filled = _BAR * metrics.step // max(1, metrics.steps)
        full, empty = ("\u2501", "\u2500") if self._unicode else ("#", "-")
        parts = {
            "stage": metrics.stage,
            "bar": full * filled + empty * (_BAR - filled),
            "step": f"step {metrics.step}/{metrics.steps}",
            "loss": f"loss {metrics.loss:.4f}",
            "norm": f"grad norm {metrics.grad_norm:.3f}",
            "lr": f"lr {metrics.lr:.2e}",
            "speed": f"{metrics.tokens_per_s:,.0f} tokens/s",
            "left": f"{duration(left_s)} left",
        }
        for part in _DROPPED_FIRST:
            if len("  ".join(parts.values())) < self._console.width:
                break
            del parts[part]
        return Text("  ".join(parts.values()), no_wrap=True, overflow="crop")


class Eta:
    """Seconds to the end of the run, from a smoothed pace of the current stage.

    Args:
        stages: Steps and tokens of each stage, by name and in order; what is missing is
            taken to run at the pace of the current stage.
    """

    def __init__(self, stages: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._stages = dict(stages or {})
        self.restart()

    def restart(self) -> None:
        """Forget the pace: another stage has other steps."""
        self._seen, self._step_s, self._token_s = 0, 0.0, 0.0

    def update(self, metrics: StepMetrics) -> None:
        """Take in one step."""
        self._seen += 1
        token_s = 1 / metrics.tokens_per_s if metrics.tokens_per_s > 0 else 0.0
        # The first step of a stage also warms up; the second one takes its place.
        weight = 1.0 if self._seen <= 2 else _SMOOTHING
        self._step_s += weight * (metrics.step_s - self._step_s)
        self._token_s += weight * (token_s - self._token_s)

    def seconds(self, metrics: StepMetrics) -> float:
        """What is left after `metrics`, the later stages at the current tokens per second."""
        here = (metrics.stage_steps - metrics.stage_step) * self._step_s
        names = list(self._stages)
        if metrics.stage not in names:
            return (metrics.steps - metrics.step) * self._step_s
        later = names[names.index(metrics.stage) + 1 :]
        return here + sum(self._stages[name][1] for name in later) * self._token_s


def plain_line(metrics: StepMetrics, left_s: float) -> str:
    """One step as `key=value` pairs."""
    return (
        f"stage={metrics.stage} step={metrics.step}/{metrics.steps} loss={metrics.loss:.4f} "
        f"grad_norm={metrics.grad_norm:.3f} lr={metrics.lr:.2e} tokens={metrics.tokens} "
        f"tokens/s={metrics.tokens_per_s:.0f} eta={duration(left_s)}"
    )


def duration(seconds: float) -> str:
    """`41s`, `3m12s`, `2h05m`, `3d04h`."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and len(str(value)) <= 80
