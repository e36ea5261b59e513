"""What the ranks of a test world do; called by name in every rank."""

import math
from pathlib import Path
from typing import Any

from longspan.trainer.data.samples import join
from longspan.trainer.engine.checkpoint import load_engine, save_engine
from longspan.trainer.engine.engine import Engine
from longspan.trainer.settings import RunSettings
from support.tiny import SEQUENCES, VOCAB, random_sample


def batches(engine: Engine, step: int, sequences: int = SEQUENCES) -> list[Any]:
    """This data rank's micro-batches of a step."""
    width, data = engine.stage.micro_batch, engine.groups.dp.size()
    length = engine.stage.length
    documents = min(3, length // 3)
    samples = [
        random_sample(1000 * step + number, length, documents) for number in range(sequences)
    ]
    groups = [join(samples[i : i + width]) for i in range(0, sequences, width)]
    return groups[engine.data_rank :: data]


def take_step(engine: Engine, step: int, lr: float = 1e-2) -> tuple[float, float]:
    """One step's mean loss and gradient norm."""
    sums = engine.train_step(batches(engine, step), lr, False, ("test", step)).on_host()
    return sums["loss"] / sums["tokens"], math.sqrt(sums["square_norm"])


def train(run: RunSettings, steps: int = 4, lr: float = 1e-2) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps from scratch."""
    engine = Engine(run, run.stages[0], VOCAB)
    return [take_step(engine, step, lr) for step in range(steps)]


def train_and_resume(run: RunSettings, folder: Path, steps: int = 4) -> list[tuple[float, float]]:
    """The same, through a checkpoint after half of the steps."""
    engine = Engine(run, run.stages[0], VOCAB)
    half = [take_step(engine, step) for step in range(steps // 2)]
    save_engine(engine, folder)
    engine = Engine(run, run.stages[0], VOCAB)
    assert load_engine(engine, folder, optimizer=True) == []
    return half + [take_step(engine, step) for step in range(steps // 2, steps)]


def save_then_go_on(run: RunSettings, folder: str, steps: int) -> list[tuple[float, float]]:
    """Two steps, a checkpoint, `steps` more: their losses and norms."""
    engine = Engine(run, run.stages[0], VOCAB)
    for step in range(2):
        take_step(engine, step)
    save_engine(engine, Path(folder))
    return [take_step(engine, 2 + step) for step in range(steps)]


def load_and_go_on(
    run: RunSettings, folder: str, steps: int, optimizer: bool = True
) -> list[tuple[float, float]]:
    """The same steps after a load into a fresh engine."""
    engine = Engine(run, run.stages[0], VOCAB)
    load_engine(engine, Path(folder), optimizer=optimizer)
    return [take_step(engine, 2 + step) for step in range(steps)]
