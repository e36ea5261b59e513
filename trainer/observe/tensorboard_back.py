"""TensorBoardBack: event files in a run's folder, in which no step has two values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from ..run_directory import RunDirectory

_FLUSH_S = 10


class TensorBoardBack:
    """Writes the numbers of rows, and as text the recipe, tables and artifacts.

    A file begins with the step from which it replaces what earlier files hold.

    Args:
        begin: `dir`, `config` and `attempt`. What a further start in the same attempt has to know
            is added.
    """

    def __init__(self, begin: dict[str, Any]) -> None:
        self._folder = Path(begin["dir"]) / "tensorboard"
        self._begin = begin
        self._writer: Any = None
        begin.setdefault("files", 0)
        begin.setdefault("newest", -1)
        # Until a checkpoint says more, an attempt after the first begins anew.
        begin.setdefault("first", 0 if begin["attempt"] > 1 else None)
        self.about = f"tensorboard --logdir {RunDirectory(Path(begin['dir']))}/tensorboard"

    def log(self, row: dict[str, Any]) -> None:
        """See `Back`; strings have no place here."""
        step, newest = int(row["step"]), self._begin["newest"]
        self._begin["newest"] = max(newest, step)
        # Several rows of a step say the same of it.
        known = {"step", *(("tokens", "attempt") if step <= newest else ())}
        for name, value in row.items():
            if name not in known and isinstance(value, int | float) and math.isfinite(value):
                self._open().add_scalar(name, value, step)

    def summary(self, values: dict[str, Any]) -> None:
        """See `Back`."""
        self._text("summary", yaml.safe_dump(values), max(0, self._begin["newest"]))

    def table(self, values: dict[str, Any]) -> None:
        """See `Back`."""
        rows = [values["columns"], ["-" for _ in values["columns"]], *values["rows"]]
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        step = int(values["at"]["step"])
        self._open().add_text(values["name"], "\n".join(lines), step)

    def artifact(self, values: dict[str, Any]) -> None:
        """See `Back`."""
        step = int(values["metadata"].get("step", max(0, self._begin["newest"])))
        self._open().add_text(values["type"], values["path"], step)

    def back_to(self, values: dict[str, Any]) -> None:
        """See `Back`."""
        step = int(values["step"])
        if self._begin["newest"] > step or self._begin["files"] == 0:
            self._close()
            self._begin |= {"first": step + 1, "newest": step}

    def finish(self, code: int) -> str:
        """See `Back`."""
        self._close()
        return ""

    def _text(self, name: str, text: str, step: int) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._open().add_text(name, indented, step)

    def _open(self) -> Any:
        if self._writer is not None:
            return self._writer
        from tensorboardX import SummaryWriter

        begin = self._begin
        begin["files"] += 1
        # Two files of one second would have one name.
        suffix = f".{begin['attempt']:04d}.{begin['files']:03d}"
        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=begin["first"],
            flush_secs=_FLUSH_S,
            filename_suffix=suffix,
        )
        if begin["files"] == 1 and begin["config"] is not None:
            self._text("recipe", yaml.safe_dump(begin["config"], sort_keys=False), 0)
        begin["first"] = None
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
