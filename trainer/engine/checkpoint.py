"""Megatron's distributed checkpoints of an engine, resharded to any layout on load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from .engine import Engine
from .hooks import mend_writer

_BYTES_PER_PARAMETER = 16  # fp32 weight, fp32 main weight, two moments


def save_engine(engine: Engine, directory: Path) -> None:
    """Write the weights and the optimizer's state to an empty directory, from all ranks.

    Raises:
        OSError: Or another error of megatron's, on the ranks that could not write.
    """
    mend_writer()
    assert engine.optimizer is not None
    state: dict[str, Any] = {"model": _model_state(engine)}
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


def load_engine(engine: Engine, directory: Path, *, optimizer: bool) -> None:
    """Read weights, and the optimizer's state if asked for, written under any layout.

    For a weights-only load the optimizer must not be asked for its state: megatron would fill it
    with uninitialised memory (trap S9).
    """
    assert engine.optimizer is not None
    state: dict[str, Any] = {"model": _model_state(engine)}
    if optimizer:
        engine.optimizer.create_state()
        state["optimizer"] = engine.optimizer.megatron.sharded_state_dict(
            state["model"], is_loading=True, metadata=_metadata()
        )
    with _as_exception():
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))  # type: ignore
    engine.model.load_state_dict(loaded["model"])
    if optimizer:
        engine.optimizer.megatron.load_state_dict(loaded["optimizer"])
        engine.optimizer.own_steps()
        engine.optimizer.apply_settings()
    else:
        engine.optimizer.megatron.reload_model_params()


def checkpoint_bytes(engine: Engine) -> int:
    """About how much disk a checkpoint of the whole model takes."""
    mine = torch.tensor(sum(p.numel() for p in engine.model.parameters()), dtype=torch.float64)
    mine = mine.to(engine.device) / engine.groups.dp_cp.size()
    torch.distributed.all_reduce(mine)
    return int(mine.item()) * _BYTES_PER_PARAMETER


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
