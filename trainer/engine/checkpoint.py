"""Megatron's distributed checkpoints of an engine, resharded to any layout on load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from .engine import Engine
from .hooks import mend_writer
from .partition import ADDED, global_names

_BYTES_PER_PARAMETER = 16  # fp32 weight, fp32 main weight, two moments


def save_engine(engine: Engine, directory: Path) -> None:
    """Write the weights and the optimizer's state to an empty directory, from all ranks.

    Raises:
        OSError: Or another error of megatron's, on the ranks that could not write.
    """
    mend_writer()
    assert engine.optimizer is not None
    engine.optimizer.create_state()  # of what never learned
    state: dict[str, Any] = {"model": _model_state(engine), "steps": _all_steps(engine)}
    with engine.optimizer.equal_steps():
        state["optimizer"] = engine.optimizer.megatron.sharded_state_dict(
            state["model"], is_loading=False, metadata=_metadata()
        )
    with _as_exception():
        dist_checkpointing.save(
            state,
            str(directory),
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            content_metadata=_metadata(),
        )


def load_engine(engine: Engine, directory: Path, *, optimizer: bool) -> list[str]:
    """Read weights, and the optimizer's state if asked for, written under any layout.

    What the stage's attention adds to the model keeps its initial weights and zero moments where
    the checkpoint does not have it. For a weights-only load the optimizer must not be asked for its
    state: megatron would fill it with uninitialised memory (trap S9).

    Returns:
        The keys of the model's parameters that the checkpoint does not have.
    """
    assert engine.optimizer is not None
    state: dict[str, Any] = {"model": _model_state(engine)}
    if optimizer:
        engine.optimizer.create_state()
        with engine.optimizer.equal_steps():
            state["optimizer"] = engine.optimizer.megatron.sharded_state_dict(
                state["model"], is_loading=True, metadata=_metadata()
            )
    with _as_exception():
        new = _new_keys(state["model"], directory)
        _drop(state, new)
        mappings = _mappings(state)
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))  # type: ignore
        _refill(loaded, mappings)
    held = engine.model.state_dict()
    engine.model.load_state_dict({**held, **loaded["model"]})
    if optimizer:
        engine.optimizer.megatron.load_state_dict(loaded["optimizer"])
        names = {parameter: name for name, parameter in global_names(engine.model)}
        steps: dict[str, int] = loaded["steps"]
        engine.optimizer.set_steps(lambda parameter: steps.get(names[parameter], 0))
        engine.optimizer.apply_settings()
    else:
        engine.optimizer.megatron.reload_model_params()
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, sorted(new))
    return sorted({key for keys in everywhere for key in keys})


def checkpoint_bytes(engine: Engine) -> int:
    """About how much disk a checkpoint of the whole model takes."""
    mine = torch.tensor(sum(p.numel() for p in engine.model.parameters()), dtype=torch.float64)
    mine = mine.to(engine.device) / engine.groups.dp_cp.size()
    torch.distributed.all_reduce(mine)
    return int(mine.item()) * _BYTES_PER_PARAMETER


def _all_steps(engine: Engine) -> dict[str, int]:
    """How often every parameter of the whole model was updated, by its global name."""
    assert engine.optimizer is not None
    mine, names = engine.optimizer.steps(), dict(global_names(engine.model))
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    here = {name: mine[parameter] for name, parameter in names.items() if parameter in mine}
    torch.distributed.all_gather_object(gathered, here)
    return {name: count for steps in gathered for name, count in steps.items()}


def _new_keys(model_state: dict[str, Any], directory: Path) -> set[str]:
    """Keys of what attention adds to the model that a checkpoint does not have."""
    stored = dist_checkpointing.load_tensors_metadata(str(directory))
    keys = {tensor.key for tensor in model_state.values() if hasattr(tensor, "key")}
    return {key for key in keys if ADDED in key and key not in stored}


def _drop(state: dict[Any, Any], keys: set[str]) -> None:
    """Take tensors of these keys, and the optimizer's state of them, out of what is read."""
    for name, value in list(state.items()):
        if isinstance(value, dict):
            _drop(value, keys)
        elif isinstance(value, ShardedTensor) and value.key[value.key.find("decoder.") :] in keys:
            del state[name]


def _mappings(state: dict[Any, Any]) -> dict[Any, Any]:
    """The mappings in a state, without anything else."""
    return {name: _mappings(value) for name, value in state.items() if isinstance(value, dict)}


def _refill(loaded: dict[Any, Any], mappings: dict[Any, Any]) -> None:
    """Put empty mappings back, which a load leaves out and megatron's optimizer looks for."""
    for name, inner in mappings.items():
        _refill(loaded.setdefault(name, {}), inner)


@contextmanager
def _as_exception() -> Iterator[None]:
    """torch's CheckpointException is no Exception; raise the first rank's cause instead."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from cause


def _metadata() -> dict[str, Any]:
    """How megatron shall lay out a checkpoint.

    Made anew for every use: megatron stores the process group of the moment in it. The sharding
    type is explicit, because 0.16 cannot load what its default saves.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _model_state(engine: Engine) -> dict[str, Any]:
    return engine.model.sharded_state_dict(metadata=_metadata())
