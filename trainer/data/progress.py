"""How far a long reading has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"longspan: {line}\n")
    sys.stderr.flush()


class Reading:
    """Shows the share of bytes read, as a context manager; silent unless `shown`.

    Args:
        what: What is being done, such as "tokenising".
        total: Bytes in all.
        shown: Whether to show anything.
    """

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self.total = max(total, 1)
        self.done = 0
        self._what = what
        self._shown = shown
        self._said = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = bar.add_task(what, total=self.total)
            self._bar = bar

    def __enter__(self) -> Reading:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Show that `done` bytes have been read."""
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif self._shown and time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            say(f"{self._what}: {100 * done / self.total:.0f}%")
