"""WandbBack: a run on Weights & Biases, one over all its attempts."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ...redact import redact_text
from .wandb_account import key_fix, key_source, probe, server
from .wandb_folders import catch_up, claim, mark_uploaded, sync_command

_START_S = 60
_UPLOAD_S = 600
_FLUSH_S = 2.0
_FIX = {
    "rejected": "the key that {source} holds is rejected ({fix})",
    "unreachable": "{url} cannot be reached",
}


class WandbBack:
    """Keeps the run on the server, or in a folder to upload later while that is not to be had.

    Args:
        begin: `id`, `project`, `name`, `dir`, `mode`, `config`, `attempt`, `pid` of the process
            whose use of the machine is measured, `events` (a path) and `events_size` (bytes of it
            that earlier attempts have written). What a further start in the same attempt has to
            know is added.
    """

    def __init__(self, begin: dict[str, Any]) -> None:
        # Errors of wandb itself would go to its makers with whatever they quote.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # What is still to upload has to lie with the run, not in somebody's home.
        folder = Path(begin["dir"]) / "wandb"
        folder.mkdir(exist_ok=True)
        os.environ["WANDB_DATA_DIR"] = str(folder)
        self._begin, self._axes = begin, set[str]()
        # Rows are numbered behind those of all attempts before, as no server is asked offline.
        self._row = begin.setdefault("row", 2 * _lines(Path(begin["events"]), begin["events_size"]))
        # An attempt that began offline stays so: its later rows have no place before the first.
        why = begin.get("offline") or (self._why_not() if begin["mode"] == "online" else "")
        # One lock for all starts: that of a back that failed would go with it.
        begin["lock"] = begin.get("lock") or claim(Path(begin["dir"]))
        if begin["mode"] == "online" and not why and begin["lock"] and not begin.get("started"):
            why = catch_up(Path(begin["dir"]))
        if not begin.get("started"):
            begin["offline"] = why
        waiting = sync_command(Path(begin["dir"]))
        self._run = self._start("offline" if why else begin["mode"])
        self.about = redact_text(self._run.url or "offline" + (why and f", as {why}"))
        if self._run.url and waiting:
            self.about += f"; earlier attempts are not there yet, to upload: {waiting}"
        if begin["config"] is not None:
            config = {**begin["config"], "attempt": begin["attempt"]}
            self._run.config.update(config, allow_val_change=True)
            self._run.summary["attempt"] = begin["attempt"]
        for axis in ("step", "tokens", "attempt"):
            self._run.define_metric(axis)

    def log(self, row: dict[str, Any]) -> None:
        """See `Back`; metrics of a group share an axis."""
        for group in {name.partition("/")[0] for name in row if "/" in name} - self._axes:
            self._axes.add(group)
            axis = "tokens" if group == "by_tokens" else "step"
            self._run.define_metric(f"{group}/*", step_metric=axis)
        self._row = self._begin["row"] = self._row + 1
        self._run.log(row, step=self._row, commit=True)

    def summary(self, values: dict[str, Any]) -> None:
        """See `Back`."""
        self._run.summary.update(values)

    def table(self, values: dict[str, Any]) -> None:
        """See `Back`."""
        import wandb

        table = wandb.Table(columns=values["columns"], data=values["rows"], allow_mixed_types=True)
        self.log({**values["at"], values["name"]: table})

    def artifact(self, values: dict[str, Any]) -> None:
        """See `Back`; without the reference where wandb does not take it."""
        import wandb

        artifact = wandb.Artifact(values["name"], type=values["type"], metadata=values["metadata"])
        path = values["path"]
        with suppress(ValueError, OSError):
            uri = path if "://" in path else Path(path).as_uri()
            artifact.add_reference(uri, checksum=False)
        self._run.log_artifact(artifact, aliases=values["aliases"])

    def back_to(self, values: dict[str, Any]) -> None:
        """Nothing: rows carry their attempt."""

    def finish(self, code: int) -> str:
        """See `Back`."""
        online = not self._run.offline
        folder = Path(self._run.dir).parent
        self._run.finish(exit_code=code)
        if online:
            mark_uploaded(folder)
        left = sync_command(Path(self._begin["dir"]))
        return "" if online and left is None else f"to upload: {left or 'wandb sync'}"

    def _why_not(self) -> str:
        """Why the server cannot be used; empty when it can."""
        url, fix = server(), key_fix(rejected=True)
        found = probe(url)
        return _FIX[found].format(source=key_source(), fix=fix, url=url) if found in _FIX else ""

    def _start(self, mode: Literal["offline", "online"]) -> Any:
        import wandb

        if self._begin.get("started"):  # and still holds the run's id
            with suppress(Exception):
                wandb.teardown()
        self._begin["started"] = True
        wanted = {
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "init_timeout": _START_S,
            "finish_timeout": _UPLOAD_S,
            "x_stats_pid": self._begin["pid"],
            "x_transaction_log_flush_interval": _FLUSH_S,
        }
        # Not every version knows all of these.
        known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
        folders = set(Path(self._begin["dir"], "wandb").glob("run-*"))
        try:
            return wandb.init(
                **{key: self._begin[key] for key in ("id", "project", "name", "dir")},
                mode=mode,
                resume="allow",
                settings=wandb.Settings(**known),
            )
        except Exception:
            if mode != "online":
                raise
            # The server was there and does not start the run: it begins offline.
            for empty in set(Path(self._begin["dir"], "wandb").glob("run-*")) - folders:
                shutil.rmtree(empty, ignore_errors=True)
            return self._start("offline")


def _lines(path: Path, size: int) -> int:
    count = 0
    with suppress(OSError), path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 2**20))):
            count, size = count + chunk.count(b"\n"), size - len(chunk)
    return count
