"""An engine in this process alone, for what is done once and not trained: parity, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch.distributed as dist

from ..loopback import keep_to_loopback


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process while the block runs; there must be none yet."""
    keep_to_loopback(os.environ)
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            megatron = sys.modules.get("megatron.core.parallel_state")
            if megatron is not None:
                megatron.destroy_model_parallel()  # or it keeps groups that are no more
            dist.destroy_process_group()
