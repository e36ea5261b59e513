"""Tracking: a run's metrics for Weights & Biases and TensorBoard, at arm's length.

Other processes keep them; this one never waits.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import LongspanError
from ..checkpoint.manifest import read_manifest
from ..checkpoint.store import open_store
from ..checkpoint.survey import committed_at
from ..run_directory import RunDirectory, write_atomically
from ..settings import RunSettings
from .sink import Sink, StepMetrics, numbers
from .tracking_pipe import TrackingPipe
from .wandb_account import resolve_mode

WANDB, TENSORBOARD = "Weights & Biases", "TensorBoard"


def start_tracking(
    directory: RunDirectory, run: RunSettings, attempt: int, console: Sink
) -> list[Tracking]:
    """Begin to track wherever the recipe says; what cannot be started is a warning.

    Args:
        directory: Holds the W&B run id, so that a resumed run continues.
        run: The settings; they become the run's config.
        attempt: Counts the launches of the run.
        console: Told about the run's address and about failures.
    """
    begins = {}
    if (mode := resolve_mode(run.tracking)) != "off":
        begins[WANDB] = {"back": "wandb", "mode": mode, "project": run.tracking.project}
    if run.tracking.tensorboard:
        begins[TENSORBOARD] = {"back": "tensorboard"}
    started = []
    for name, begin in begins.items():
        try:
            pipe = TrackingPipe(name, directory.logs / f"{begin['back']}.log", console)
            if name == WANDB:
                begin |= {"id": run_id(directory, run), "name": directory.path.name}
        except OSError as error:
            console.warning(f"{name} is off: {error}")
            continue
        config = run.model_dump(mode="json")
        pipe.send("begin", {**begin, **_about(directory), "config": config, "attempt": attempt})
        started.append(Tracking(pipe, attempt, identity(directory).get("wandb", "")))
    return started


def _about(directory: RunDirectory) -> dict[str, Any]:
    size = 0
    with suppress(OSError):
        size = directory.events.stat().st_size
    path, events = str(directory.path), str(directory.events)
    return {"dir": path, "events": events, "events_size": size, "pid": os.getpid()}


class Tracking(Sink):
    """Sends rows with the step, the tokens and the number of the attempt.

    Args:
        pipe: To the process that keeps them.
        attempt: The launch that they belong to.
        run_id: Part of the names of artifacts.
    """

    def __init__(self, pipe: TrackingPipe, attempt: int, run_id: str = "") -> None:
        self._pipe, self._attempt, self._id = pipe, attempt, run_id
        self._stage, self._tokens = "", 0

    def stage_started(self, name: str, index: int, info: Mapping[str, Any]) -> None:
        """Rows carry the stage's name."""
        self._stage = name

    def step(self, metrics: StepMetrics) -> None:
        """Log under `train/`, and the loss once more by tokens."""
        self._tokens, self._stage = metrics.tokens, metrics.stage
        fields = ["loss", "grad_norm", "lr", "tokens_per_s", "step_s", "data_s", "tflops_per_s"]
        fields += ["mfu"] if metrics.mfu is not None else []
        fields += ["context_bytes", "context_wait_s"] if metrics.context_bytes else []
        fields += ["imbalance"] if metrics.imbalance is not None else []
        fields += ["peak_bytes"] if metrics.peak_bytes is not None else []
        values = {field: getattr(metrics, field) for field in fields} | dict(metrics.losses)
        values = {f"train/{field}": value for field, value in values.items()}
        self._log(metrics.step, {**values, "by_tokens/loss": metrics.loss})

    def observed(self, step: int, layers: Sequence[Mapping[str, float]]) -> None:
        """Log under `attention/layer_<number>/`."""
        named = {
            f"attention/layer_{number}/{key}": value
            for number, values in enumerate(layers)
            for key, value in values.items()
        }
        self._log(step, named)

    def compared(self, step: int, values: Mapping[str, Any]) -> None:
        """Log under `canary/`."""
        self._log(step, _named("canary", values))

    def alarm(self, name: str, step: int, text: str) -> None:
        """Keep the alarm with the run."""
        self._pipe.send("summary", {f"alarm/{name}": f"step {step}: {text}"})

    def skipped(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        """Log under `skipped/`."""
        self._log(step, {"skipped/loss": loss, "skipped/grad_norm": grad_norm})

    def rewound(self, step: int, to: int, sequences: int, reason: str) -> None:
        """Steps after `to` come once more."""
        self._log(step, {"rewound/to": to, "rewound/sequences": sequences})
        self._pipe.send("back_to", {"step": to})

    def evaluated(self, name: str, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """Log the numbers under the evaluation's name, lists of blocks as tables."""
        found = {**numbers(values), "seconds": seconds}
        by_tokens = {f"by_tokens/{name}_loss": found["loss"]} if "loss" in found else {}
        self._log(step, _named(name, found) | by_tokens)
        for key, rows in values.items():
            if isinstance(rows, Sequence) and rows and isinstance(rows[0], Mapping):
                self._table(f"{name}/{key}", step, rows)

    def saving(self, step: int, stall_s: float) -> None:
        """Log under `checkpoint/`."""
        self._log(step, {"checkpoint/stall_s": stall_s})

    def saved(self, step: int, path: Path, seconds: float) -> None:
        """Refer to the checkpoint where it is."""
        self._log(step, {"checkpoint/save_s": seconds})
        about = {"step": step, "stage": self._stage, "attempt": self._attempt, "path": str(path)}
        self._artifact("checkpoint", str(path), [f"step-{step}"], about)

    def restored(self, step: int, path: Path, seconds: float) -> None:
        """Steps after `step`, if there were any, come once more."""
        self._pipe.send("back_to", {"step": step})
        self._log(step, {"checkpoint/restore_s": seconds})

    def exported(self, path: Path, checkpoint: str) -> None:
        """Refer to a model that was exported, and end."""
        about = {"checkpoint": checkpoint, "path": str(path)}
        self._artifact("export", str(path), [checkpoint], about)
        self._pipe.finish(0)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary and its tables with the run, and mark it finished."""
        self._pipe.send("summary", dict(summary))
        if stages := summary.get("stages"):
            self._table("evaluation/stages", summary.get("steps", 0), stages)
        self._pipe.finish(0)

    def stopped(self, step: int, reason: str) -> None:
        """Mark the run as not finished; a resumed run goes on with it."""
        self._pipe.finish(1)

    def close(self) -> None:
        """Let the tracker end; without `finished` the run is marked as failed."""
        self._pipe.finish(1)

    def _at(self, step: int) -> dict[str, Any]:
        at: dict[str, Any] = {"step": step, "attempt": self._attempt}
        at |= {"tokens": self._tokens} if self._tokens else {}
        return at | ({"stage": self._stage} if self._stage else {})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._pipe.send("log", {**self._at(step), **values})

    def _table(self, name: str, step: int, blocks: Sequence[Mapping[str, Any]]) -> None:
        """Blocks as rows, of what is no block itself."""
        columns = [
            key for key, value in blocks[0].items() if not isinstance(value, Mapping | list | tuple)
        ]
        rows = [[block.get(column) for column in columns] for block in blocks]
        about = {"name": name, "columns": columns, "rows": rows, "at": self._at(step)}
        self._pipe.send("table", about)

    def _artifact(self, kind: str, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        name = f"{kind}-{self._id}" if self._id else kind
        values = {"name": name, "type": kind, "path": path, "metadata": about}
        self._pipe.send("artifact", {**values, "aliases": ["latest", *aliases]})


def run_id(directory: RunDirectory, run: RunSettings) -> str:
    """The W&B id of the run: made once, then read, so that every attempt continues it.

    It is in the run's folder and, should that be lost, in its checkpoints.
    """
    found = identity(directory).get("wandb") or _id_of_checkpoint(directory, run)
    made = found or secrets.token_hex(4)
    write_atomically(directory.path / "wandb.json", json.dumps({"id": made}) + "\n")
    return made


def identity(directory: RunDirectory) -> dict[str, str]:
    """What a checkpoint keeps of the run's tracking; empty when nothing has tracked it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = (directory.path / "wandb.json").read_text("utf-8")
        return {"wandb": str(json.loads(text)["id"])}
    return {}


def _id_of_checkpoint(directory: RunDirectory, run: RunSettings) -> str | None:
    with suppress(LongspanError, AttributeError, TypeError):
        files = committed_at(open_store(run.checkpoint.where, directory.path), None)
        return read_manifest(files).info.get("tracking", {}).get("wandb")
    return None


def _named(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {f"{group}/{key}": value for key, value in numbers(values).items()}
