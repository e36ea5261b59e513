"""What tests of tracking share: a console that listens, metrics of a step, and wandb's reader."""

import json
import os
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator
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


def tensorboard_points(folder: Path) -> dict[tuple[str, int], list[float]]:
    """The values by tag and step that TensorBoard shows for a folder of event files.

    Files are read by name; one that begins at a step replaces what there is from that step on.
    """
    points: dict[tuple[str, int], list[float]] = {}
    for file in sorted(folder.iterdir()):
        for event in _events(file):
            if event.session_log.status == event.session_log.START:
                points = {key: values for key, values in points.items() if key[1] < event.step}
            for value in event.summary.value:
                points.setdefault((value.tag, event.step), []).append(value.simple_value)
    return points


def _events(file: Path) -> Iterator[Any]:
    """The events of a file: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = file.read_bytes(), 0
    while at + 12 <= len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        event = Event()
        event.ParseFromString(content[at + 12 : at + 12 + size])
        at += 16 + size
        yield event
