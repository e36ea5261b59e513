"""What a rank writes of an engine's state, and how it takes a state back under any layout.

Every element of every parameter is written by one rank of the world: optimizer shards are disjoint
over data and context ranks; of what tensor ranks hold alike the first writes, and of tied
embeddings the first pipeline rank. No rank gathers what others have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint.boxes import Part, matrix
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.index import INDEX, build_index
from ..checkpoint.shard import Piece, Staging, shard_name, stage
from ..checkpoint.stored import StoredState
from ..platform import barrier
from .engine import Engine
from .partition import EMBEDDING, global_names, is_added, place_of

Steps = dict[str, int]


def state_pieces(engine: Engine) -> list[Piece]:
    """What this rank writes: views of its weights' main copies and their moments."""
    assert engine.optimizer is not None
    engine.optimizer.create_state()  # of what never learned
    names = {parameter: name for name, parameter in global_names(engine.model)}
    pieces = []
    for parameter, main, state, first in engine.optimizer.shards():
        name = names[parameter]
        if not _writes(engine, name, parameter):
            continue
        part = _part(engine, name, parameter)
        for box, start in part.boxes(first, first + main.numel()):
            at = slice(start - first, start - first + box.size)
            tensors = (main, state["exp_avg"], state["exp_avg_sq"])
            views = tuple(tensor.detach().view(-1)[at] for tensor in tensors)
            pieces.append(Piece(name, part.shape, box, (views[0], views[1], views[2])))
    return pieces


def state_steps(engine: Engine) -> Steps:
    """How often every parameter of this rank's shards was updated, by its global name."""
    assert engine.optimizer is not None
    counts = engine.optimizer.steps()
    return {name: counts[p] for name, p in global_names(engine.model) if p in counts}


def model_dtype(engine: Engine) -> str:
    """Of the weights, as a checkpoint's index calls it."""
    return "bf16" if engine.config.params_dtype == torch.bfloat16 else "fp32"


@torch.no_grad()
def load_state(engine: Engine, stored: StoredState, *, optimizer: bool) -> list[str]:
    """Take weights, and the moments and step counts if asked for, written under any layout.

    What the stage's attention adds to the model keeps its initial weights and zero moments where
    the checkpoint does not have it.

    Returns:
        The global names of the parameters that the checkpoint does not have, on all ranks.

    Raises:
        CheckpointError: It is of another model, or cannot be read.
    """
    assert engine.optimizer is not None
    if optimizer:
        engine.optimizer.create_state()
    shards = {p: (main, state, first) for p, main, state, first in engine.optimizer.shards()}
    new = []
    for name, parameter in global_names(engine.model):
        if is_added(name) and name not in stored:
            new.append(name)
            continue
        part = _part(engine, name, parameter)
        weight = stored.read(name, part, "weight")
        parameter.copy_(weight.view_as(parameter))
        if parameter not in shards:
            continue
        main, state, first = shards[parameter]
        span = first, first + main.numel()
        main.copy_(weight[slice(*span)].view_as(main))
        if optimizer:
            state["exp_avg"].copy_(stored.read(name, part, "exp_avg", *span).view_as(main))
            state["exp_avg_sq"].copy_(stored.read(name, part, "exp_avg_sq", *span).view_as(main))
    if optimizer:
        names = {parameter: name for name, parameter in global_names(engine.model)}
        steps = stored.index.steps
        engine.optimizer.set_steps(lambda parameter: steps.get(names[parameter], 0))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, new)
    return sorted({name for names in everywhere for name in names})


def save_engine(engine: Engine, folder: Path) -> None:
    """Write an engine's state to a folder from all ranks, without a run around it."""
    shard = stage(state_pieces(engine), Staging())
    name = shard_name(dist.get_rank())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        file.writelines(shard.parts())
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (name, shard.entries, state_steps(engine)))
    if dist.get_rank() == 0:
        steps = {key: count for _, _, counts in told for key, count in counts.items()}
        index = build_index(model_dtype(engine), [at[:2] for at in told], steps)
        (folder / INDEX).write_bytes(index.to_json())
    barrier()


def load_engine(engine: Engine, folder: Path, *, optimizer: bool) -> list[str]:
    """`load_state` of a folder that `save_engine` or a run wrote."""
    return load_state(engine, StoredState(CheckpointFiles.of(folder)), optimizer=optimizer)


def _part(engine: Engine, name: str, parameter: torch.nn.Parameter) -> Part:
    """Which part of the full parameter this rank's is."""
    tp = engine.groups.tp
    place = place_of(parameter, name, tp.rank(), tp.size())
    columns = place.columns or (0, matrix(place.shape)[1])
    return Part(place.shape, place.rows, columns)


def _writes(engine: Engine, name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether this rank's shard of a parameter is not written by another one as well."""
    if name == EMBEDDING and not engine.model.pre_process:
        return False
    split = "experts" in name or getattr(parameter, "tensor_model_parallel", False)
    return split or engine.groups.tp.rank() == 0
