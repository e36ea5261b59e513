"""Every load and store of an interpreted Triton kernel lies in a tensor that the launch was given.

The interpreter reads and writes whatever an address leads to; a GPU may stop the program there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch


@contextmanager
def in_bounds() -> Iterator[None]:
    """Inside, an access outside all tensors of its launch is an AssertionError.

    Nothing happens where kernels are compiled.
    """
    from longspan.kernels.triton.tuning import INTERPRETED
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    if not INTERPRETED:
        yield
        return

    ranges: list[tuple[int, int]] = []

    def init(self, args, kwargs):
        host = original_init(self, args, kwargs)
        tensors = [x for x in (*host[0], *host[1].values()) if isinstance(x, torch.Tensor)]
        storages = [x.untyped_storage() for x in tensors]
        ranges[:] = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        return host

    def check(pointers, mask, size: int) -> None:
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not at.size:
            return
        begins, ends = (np.array(x, dtype=np.uint64) for x in zip(*ranges, strict=True))
        which = np.searchsorted(begins, at, side="right").astype(np.int64) - 1
        inside = (which >= 0) & (at + np.uint64(size) <= ends[which.clip(0)])
        assert inside.all(), f"{int((~inside).sum())} of {at.size} accesses are outside"

    def checked(name: str, pointer: int, mask: int):
        original = getattr(InterpreterBuilder, name)

        def access(self, *args):
            size = args[pointer].get_element_ty().primitive_bitwidth // 8
            check(args[pointer], args[mask], size)
            return original(self, *args)

        patch.setattr(InterpreterBuilder, name, access)

    original_init = GridExecutor._init_args_hst
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", init)
        checked("create_masked_load", 0, 1)
        checked("create_masked_store", 0, 2)
        checked("create_atomic_rmw", 1, 3)
        yield
