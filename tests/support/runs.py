"""Runs whose checkpoints are real and whose training never was: saved by one rank, in-process."""

from pathlib import Path

import torch
from longspan.trainer.checkpoint.boxes import Box, matrix
from longspan.trainer.checkpoint.cursor import Cursor
from longspan.trainer.checkpoint.saver import Saver, State
from longspan.trainer.checkpoint.shard import Piece
from longspan.trainer.checkpoint.store import open_store
from longspan.trainer.run_directory import create_or_open
from longspan.trainer.settings import RunSettings
from support.short_run import short_run

SHAPES = {"layer.0.weight": (4, 3), "embedding.word_embeddings.weight": (6, 2), "norm": (5,)}


def settings(**changes) -> RunSettings:
    """Of a run with one stage."""
    return short_run(**{"checkpoint": {"every": 10, "keep": 9}} | changes)


def state(seed: int, shapes=SHAPES) -> State:
    """Random weights and moments."""
    draw = torch.Generator().manual_seed(seed)
    pieces = []
    for name, shape in shapes.items():
        rows, columns = matrix(shape)
        tensors = tuple(torch.randn(rows * columns, generator=draw) for _ in range(3))
        pieces.append(Piece(name, shape, Box(0, rows, 0, columns), tensors))
    return State(pieces, "fp32", dict.fromkeys(shapes, seed))


def run_with(path: Path, states: dict[int, State], **changes) -> Path:
    """A run directory with a checkpoint per step. Needs a process group of one rank."""
    run = settings(**changes)
    directory = create_or_open(path, run, "made")
    saver = Saver(open_store(run.checkpoint.where, directory.path), run.checkpoint)
    for step, mine in states.items():
        info = {"stage_name": "short", "ranks": 1, "parallel": {"tensor": 1}, "length": 256 + step}
        cursor = Cursor(step=step, stage_step=step, next_sample=4 * step, tokens=1024 * step)
        saver.save(lambda mine=mine: mine, cursor, info, wait=True)
        outcome = saver.wait()
        assert outcome is not None and outcome.error is None and not outcome.warning
    return path
