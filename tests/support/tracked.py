"""What tests of tracking share: a console that listens, metrics of a step, and wandb's reader."""

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from longspan.trainer.observe.sink import Sink, StepMetrics


def without_set_up(folder: Path, monkeypatch) -> None:
    """A home and a working folder without any set-up of wandb, whatever this machine has."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(folder)


class Console(Sink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.warned.append(text)


def metrics(step: int) -> StepMetrics:
    """A step like any other."""
    return StepMetrics(
        step=step,
        steps=9,
        stage="short",
        stage_step=step,
        stage_steps=9,
        tokens=1024 * step,
        loss=4.5,
        grad_norm=0.5,
        lr=1e-3,
        tokens_per_s=100.0,
        step_s=10.24,
    )


def inspected(log: Path) -> dict[str, list[Any]]:
    """The records of a wandb log by type, as W&B's own reader finds them."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json",
               "--run-file", str(log), str(log.parents[1])]  # fmt: skip
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = defaultdict(list)
    for record in map(json.loads, lines):
        records[record["type"]].append(record[record["type"]])
    return records
