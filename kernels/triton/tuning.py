"""Tuning: which launch options a kernel runs with."""

# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.errors import OutOfResources

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter; settled when Triton is imported, as there."""

Options = Callable[[dict[str, Any]], Sequence[triton.Config]]
"""The configurations to try, by the keyword arguments of a launch; the best guess comes first."""


class Tuned:
    """A kernel that finds its fastest configuration, once per architecture and key.

    What was found is kept on disk, beside Triton's compiled kernels. In the interpreter, and
    while `torch.are_deterministic_algorithms_enabled()` (asked at every launch), the first
    configuration that fits on the device is used: another one may sum in another order.

    The kernel must write the same whenever it runs twice.
    """

    def __init__(self, kernel: Any, options: Options, key: Sequence[str]) -> None:
        self.kernel = kernel
        self._options = options
        self._key = list(key)
        self._tuners: dict[tuple[triton.Config, ...], Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """A launch over `grid`; the kernel's constants go in as keywords."""

        def launch(*args: Any, **constants: Any) -> None:
            configs = tuple(self._options(constants))
            # Fused multiply-adds, whatever a release of Triton takes for its default.
            fixed = {**constants, "enable_fp_fusion": True}
            if INTERPRETED or len(configs) == 1 or torch.are_deterministic_algorithms_enabled():
                self._first_that_fits(configs, grid, args, fixed)
            else:
                self._tuner(configs)[grid](*args, **fixed)

        return launch

    def _first_that_fits(
        self, configs: tuple[triton.Config, ...], grid: Any, args: Any, fixed: dict[str, Any]
    ) -> None:
        for config in configs[:-1]:
            try:
                self.kernel[grid](*args, **fixed, **config.all_kwargs())
                return
            except OutOfResources:  # A device with less shared memory than others.
                continue
        self.kernel[grid](*args, **fixed, **configs[-1].all_kwargs())

    def _tuner(self, configs: tuple[triton.Config, ...]) -> Any:
        tuner = self._tuners.get(configs)
        if tuner is None:
            tuner = triton.autotune(list(configs), self._key, cache_results=True)(self.kernel)
            self._tuners[configs] = tuner
        return tuner


def one_warp_group(configs: Sequence[triton.Config], columns: int) -> list[triton.Config]:
    """The configurations, with 4 warps at most where a product has few columns.

    Two groups of 4 warps would share its columns, and a product of 8 was seen to fault (H200,
    Triton 3.6).
    """
    if columns >= 32:
        return list(configs)
    return [
        triton.Config(c.kwargs, num_warps=min(c.num_warps, 4), num_stages=c.num_stages)
        for c in configs
    ]


def autotuned(options: Options, key: Sequence[str]) -> Callable[[Any], Tuned]:
    """Makes a `triton.jit` kernel a `Tuned` one.

    Args:
        options: Its configurations, by the constants of a launch.
        key: Arguments of the kernel whose change asks for another search. The tensors' dtypes
            count always.
    """
    return lambda kernel: Tuned(kernel, options, key)


def size_class(length: int) -> int:
    """A length to tune for: lengths within a factor of four share one."""
    return (max(length, 1).bit_length() + 1) // 2
