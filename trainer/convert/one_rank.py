"""An engine in this process alone, for what is done once and not trained: parity, export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch.distributed as dist


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process; used as it is where there is one already.

    Raises:
        RuntimeError: The process is one of several ranks.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise RuntimeError("a conversion is the work of one process, not of several ranks")
        yield
        return
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            megatron = sys.modules.get("megatron.core.parallel_state")
            if megatron is not None:
                megatron.destroy_model_parallel()  # or it keeps groups that are no more
            dist.destroy_process_group()
