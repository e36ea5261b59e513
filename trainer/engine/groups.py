"""Megatron's process groups for a stage's layout."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from ...parallel.settings import ParallelSettings
from .hooks import require
from .initialize import stable_seed


def build_groups(parallel: ParallelSettings) -> ProcessGroupCollection:
    """Split the world as `parallel` says, ending any split before it."""
    _end_groups()
    parallel_state.destroy_model_parallel()
    gc.collect()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def _end_groups() -> None:
    """End the communicators of the split before, which megatron only forgets.

    Every one of them keeps threads, and on a GPU its buffers.
    """
    require(parallel_state, "_global_process_group_list")
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # the default group
            dist.destroy_process_group(group)


def seed_step(groups: ProcessGroupCollection, *key: object) -> None:
    """Set every random stream of this rank from `key` and the rank's coordinates.

    Nothing random is carried from step to step, so a checkpoint needs no generator state and a
    resumed step draws what the uninterrupted one drew. Tensor ranks share the key, as megatron
    offsets them itself; pipeline and data ranks must not repeat each other (trap S7).
    """
    seed = stable_seed(*key, groups.pp.rank(), groups.dp_cp.rank()) % 2**31
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def is_reporting_rank(groups: ProcessGroupCollection) -> bool:
    """Whether this rank adds its losses to the global sums: one per (data, context) place."""
    return groups.pp.rank() == groups.pp.size() - 1 and groups.tp.rank() == 0
